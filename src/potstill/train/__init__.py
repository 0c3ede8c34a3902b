"""Study and the one trainer."""

"""Stock families: their configs as blueprints and back, and the names of their weights."""

"""Types, blueprints, states, artefacts and errors: what every floor speaks."""

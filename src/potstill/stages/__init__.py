"""Stages that leave an artefact and a card on disk."""

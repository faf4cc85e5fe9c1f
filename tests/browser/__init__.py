"""A package of its own, so that its conftest has another name than the others have."""

"""The frozen model: load all of it or only its embeddings, norm and head; capture the features that a draft reads."""

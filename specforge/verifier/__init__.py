"""The frozen verifier: loading it or only its embeddings, norm and head, and capturing the features of a draft."""

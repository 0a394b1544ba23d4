"""What lies on disk: artefact folders, manifests of datasets, hashes, pictures; and what is installed."""

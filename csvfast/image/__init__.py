"""Container images: OCI layouts and registries, layer encryption, unpacking. Runs in the guest, too: imports stay small."""

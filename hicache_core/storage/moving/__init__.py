"""Moving stored objects: from store to store, into an archive and out of one."""

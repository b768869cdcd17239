"""The reference server: HTTP for an engine on a cache. Import the module you need."""

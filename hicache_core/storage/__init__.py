"""L3: storage backends and what stands between them and the controller. Imports no torch."""

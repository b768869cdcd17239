"""L3: storage backends, and the layers between them and the controller. Imports no torch."""

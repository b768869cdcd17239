"""The conformance kit and fault injection for authors of backends. Imports no torch."""

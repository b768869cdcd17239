"""What operators see: metrics, KV events, spans, a status page. Import the module you need."""

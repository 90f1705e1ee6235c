"""SGLang: the launcher, the plugin inside its scheduler process, and the client of its HTTP API."""

"""Parts as a user of lrd writes them, which recipes in tests name as `module:attribute`."""

"""Where models come from: names, downloads and the cache on disk."""

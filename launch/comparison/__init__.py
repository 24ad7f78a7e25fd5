"""Several runs on one page: read from their folders (`runs`), drawn (`figures`), written (`page`)."""

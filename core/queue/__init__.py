"""The queue: Lua verbs on Redis, an in-memory twin, Celery tickets, upkeep."""

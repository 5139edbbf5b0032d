"""The process that runs plugin code: one for each plugin, started by its socket.

`frames`, `inspect` and `cachekey` are pure and free of Wasmtime: the manager imports them too.
"""

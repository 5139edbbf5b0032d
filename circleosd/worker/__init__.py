"""The process that runs plugin code: one for each plugin, started by its socket.

`frames`, `host`, `limits` and `cachekey` are free of Wasmtime: the manager imports them too.
"""

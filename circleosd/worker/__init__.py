"""The process that runs plugin code: one per plugin, started by its socket.

`frames`, `receiving`, `host`, `limits` and `cachekey` do not use Wasmtime, because the manager imports them too.
"""

"""The roles: expert host, data plane, dispatch and combine, the engine plug-in, the router."""

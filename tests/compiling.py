"""The programs that XLA compiles in a block, for tests that count them."""

import contextlib

import jax


@contextlib.contextmanager
def compiled(names):
    """Adds the name of each program that XLA compiles in the block; pmap has no cache size to ask for."""

    def listen(event, *args, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(facts.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)

"""The second engine: vLLM schedules, pages memory and spreads the model over devices; our plugin steers inside it.

In the server's process ``engine`` is what the server holds, ``output`` translates tasks and outputs. In vLLM's workers
``plugin`` is the way in and ``steering`` keeps the requests' edits and counts; ``worker_messages`` go between. Nothing
is imported here: vLLM loads the plugin in each of its processes.
"""

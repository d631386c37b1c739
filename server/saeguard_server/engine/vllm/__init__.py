"""The second engine: vLLM schedules, pages memory and spreads the model over devices; our plugin steers inside it.

In the server's process ``loading`` builds it, ``engine`` is what the server holds, ``client`` is vLLM as that sees it,
``asking`` turns a task into vLLM's terms and ``answering`` turns vLLM's outputs back. In vLLM's workers ``plugin`` is
the way in, ``places`` puts ``ops`` into the model, ``batch`` says whose tokens a pass reads, ``steered`` keeps the
requests' edits and counts. ``orders`` and ``plan`` go from one to the other.

Nothing is imported here: vLLM loads the plugin in each of its processes, which need none of the rest.
"""

"""Quality at true bytes: methods, tasks, and a runner that puts them on the same axis.

``runner.evaluate`` is the way in; ``methods.get_method`` and ``tasks.TASKS`` say what there is.
"""

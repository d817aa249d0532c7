"""papermill's engine `nbdurable` (entry point `papermill.engine`).

Owns the name only. It imports papermill when it is used: papermill loads this module while it is itself being
imported, so that a class derived from papermill's could not be there yet.
"""

from __future__ import annotations

from typing import Any


class DurableEngine:
    """Executes notebooks for papermill with cell ids, true cell states and whole saves.

    With `assignment=` (an `execution.Assignment`, from our executor) it executes a run of the coordinator.
    Without (`papermill --engine nbdurable`) it is papermill's own engine with the virtues above.
    """

    @classmethod
    def execute_notebook(
        cls, nb: Any, kernel_name: str, output_path: str | None = None, **options: Any
    ) -> Any:
        """Execute a notebook node and return it."""
        from nbdurable.runner import execution

        return execution.execute(nb, kernel_name, output_path=output_path, **options)

    @classmethod
    def nb_kernel_name(cls, nb: Any, name: str | None = None) -> Any:
        """Return the name of a notebook's kernel."""
        from papermill.utils import nb_kernel_name

        return nb_kernel_name(nb, name)

    @classmethod
    def nb_language(cls, nb: Any, language: str | None = None) -> Any:
        """Return a notebook's language."""
        from papermill.utils import nb_language

        return nb_language(nb, language)

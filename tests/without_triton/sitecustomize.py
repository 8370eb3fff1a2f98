"On PYTHONPATH, this file hides Triton from Python and from every process that it starts: a laptop with macOS or Windows."
import sys
from importlib.machinery import PathFinder


class WithoutTriton(PathFinder):
    "Finds everything that is installed, apart from Triton."
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        return (found for found in super().find_distributions(*args, **kwargs) if found.metadata["Name"] != "triton")


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTriton

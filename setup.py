"Packaging: everything it says stands in settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def listed(key: str) -> list[str]:
    return [line.strip() for line in cfg[key].splitlines() if line.strip()]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    keywords=cfg["keywords"],
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["tritoncls", "tritoncls.*"]),
    package_data={"tritoncls": ["configs/*.yaml", "*.pyi", "py.typed"]},
    install_requires=listed("requirements"),
    extras_require={"dev": listed("dev_requirements")},
    entry_points={
        "console_scripts": listed("console_scripts"),
        "nbdev": ["tritoncls=tritoncls._modidx:d"],
    },
)

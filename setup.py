"""Packaging, read from settings.ini; nbdev's own template needs pkg_resources, which setuptools no longer has."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser()
parser.read(root/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("physics", "tensorboard", "onnx")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg["requirements"].split(),
    extras_require=extras | {"dev": sum(extras.values(), cfg["dev_requirements"].split())},
    packages=find_packages(include=["radrotator", "radrotator.*"]),
    package_data={"radrotator": ["weights/*.safetensors", "templates/*.html", "app/*.css", "app/*.js"]},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f'{cfg["lib_name"]}={cfg["lib_path"]}._modidx:d'],  # links in other nbdev sites
    },
    zip_safe=False,
)

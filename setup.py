"""Refuses a plain `pip install .`: presets, scripts and logs lie in the checkout, which an editable install uses."""

import sys

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class Refused(bdist_wheel):
    """Builds no wheel; an editable install asks for its tag alone."""

    def run(self):
        sys.exit("this project runs from its checkout: pip install -e .")


setup(cmdclass={"bdist_wheel": Refused})

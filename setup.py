"The package, described by settings.ini: nbdev reads the same file."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

def lines(name): return [o.strip() for o in (here/name).read_text(encoding='utf-8').splitlines() if o.strip()]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], keywords=cfg['keywords'].split(),
    license='Apache-2.0', license_files=['LICENSE'],
    packages=find_packages(include=['ftnb', 'ftnb.*']), package_data={'ftnb': ['data/*']}, zip_safe=False,
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': lines('dev_requirements.txt'), 'lab': ['jupyterlab>=4'], 'mlflow': ['mlflow'], 'tensorboard': ['tensorboard'],
                    'sweep': ['optuna>=4.5'], 'gpu': ['liger-kernel>=0.8'],
                    'docs': ['mkdocs-material>=9.5', 'mkdocs-jupyter>=0.25', 'LinkChecker>=10']},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
)

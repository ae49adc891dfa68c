"""CITATION.cff is what the Citation File Format 1.2.0 asks for, and says the version that the package has."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
#: Keys at the top of a file of the format (schema 1.2.0), and those that have to be there.
KNOWN = {"abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords"}
KNOWN |= {"license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact"}
KNOWN |= {"repository-code", "title", "type", "url", "version"}
NEEDED = {"cff-version", "message", "title", "authors"}
ENTITY, PERSON = {"name", "website", "email", "orcid"}, {"family-names", "given-names", "affiliation", "email", "orcid"}


def test_the_citation_has_the_form_and_the_package_s_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = dict(re.findall(r'^(version|license) = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M))
    assert NEEDED <= set(cited) <= KNOWN
    assert cited["cff-version"] == "1.2.0" and cited["type"] in ("software", "dataset")
    assert cited["authors"] and all(
        author and (set(author) <= ENTITY or set(author) <= PERSON) for author in cited["authors"]
    )
    assert all(isinstance(cited[key], str) and cited[key] for key in ("message", "title", "abstract", "license"))
    assert (str(cited["version"]), cited["license"]) == (project["version"], project["license"])
    assert len(set(cited["keywords"])) == len(cited["keywords"])

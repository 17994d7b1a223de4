"""The catalogue of methods says what the code says."""

from secateur.method import list_methods, method_class
from secateur.report.catalogue import catalogue as from_code
from secateur.taxonomy.catalogue import catalogue, info


def test_the_catalogue_is_up_to_date() -> None:
    assert catalogue() == from_code(), "write it with `python -m secateur.report.pages docs/methods`"


def test_records_are_those_of_the_classes() -> None:
    for name in list_methods():
        assert info(catalogue()["methods"][name]) == method_class(name).info

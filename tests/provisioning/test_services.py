"""The record of each service agrees with its unit and with the settings."""

from pathlib import Path

import pytest

from deploys import services, units
from deploys.services import COORDINATOR_SERVICES, Service
from worker import settings
from worker.cli import COMMANDS

by_service = pytest.mark.parametrize(
    "service", COORDINATOR_SERVICES, ids=lambda service: service.name
)


def test_every_unit_template_belongs_to_a_unit() -> None:
    found = {file.stem for file in units.TEMPLATES.glob("hivewright-*.j2")}
    of_slots = {services.WORKER_UNIT, services.ENROL_UNIT, services.GPU_UNIT}
    assert of_slots < found <= of_slots | {*services.COORDINATOR_UNITS}


@by_service
def test_unit_runs_the_command_of_its_record_after_the_services_that_it_wants(
    service: Service,
) -> None:
    text = units.render(service.unit, 252, 900)
    assert f"\nDescription=hivewright {service.name}: {service.description}\n" in text
    command = service.command or service.name
    assert f"/python -m worker {command} --settings " in text
    assert command in {command.name for command in COMMANDS}
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    started = [record.name for record in COORDINATOR_SERVICES]
    for name in (*service.wants, *service.after):
        assert f"hivewright-{name}.service" in lines["After"].split()
        assert started.index(name) < started.index(service.name)
    wanted = [unit for unit in lines["Wants"].split() if unit.startswith("hivewright-")]
    assert wanted == [f"hivewright-{name}.service" for name in service.wants]


@by_service
def test_unit_reads_the_file_of_its_record_and_works_in_its_folder(service: Service) -> None:
    text = units.render(service.unit, 252, 900)
    assert f" --settings {service.file}" in text
    assert f"\nStateDirectory=hivewright/{service.role}\n" in text


@by_service
def test_unit_is_handed_the_credentials_of_its_record_and_no_others(service: Service) -> None:
    lines = units.render(service.unit, 252, 900).splitlines()
    handed = [Path(line.partition(":")[2]) for line in lines if line.startswith("LoadCredential=")]
    assert handed == list(service.credentials)


@by_service
def test_record_names_sections_ports_and_files_that_the_settings_have(service: Service) -> None:
    assert set(service.sections) <= set(settings.SECTIONS)
    own = {key for key in settings.flat_keys() if key.partition("_")[0] in service.sections}
    assert {*service.ports, *service.files} <= own


def test_service_reads_own_settings_or_those_of_another_that_has_some() -> None:
    for service in COORDINATOR_SERVICES:
        assert bool(service.sections) != bool(service.settings_of)
        assert service.role in services.COORDINATOR_ROLES


def test_unit_files_follow_the_kind_of_the_host() -> None:
    assert services.units_of((), is_worker=False) == []
    assert services.units_of((), is_worker=True) == [
        services.WORKER_UNIT,
        services.ENROL_UNIT,
    ]
    both = services.units_of(services.COORDINATOR_ROLES, is_worker=True)
    assert set(both) == {services.WORKER_UNIT, services.ENROL_UNIT, *services.COORDINATOR_UNITS}

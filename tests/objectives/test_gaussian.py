"""Every objective moves a student to the right distribution where that is known: Gaussian data."""

import pytest

from tests.objectives import gaussians
from vidar.objectives.consistency import Consistency
from vidar.objectives.distillation import Distillation
from vidar.objectives.forcing import DiffusionForcing, SelfForcing, TeacherForcing
from vidar.objectives.matching import DMD, GAN, NoiseLaw, SiD

FORCINGS = {"self": SelfForcing(), "diffusion": DiffusionForcing(), "teacher": TeacherForcing()}
RATES = {"student": 0.03, "critic": 0.03}


def distilled(forcing, matching, steps=1200, rates=RATES, every=4):
    """A student's divergence from the truth before and after training."""
    networks = {"student": gaussians.beginner("student"), "critic": gaussians.beginner(), "teacher": gaussians.truth()}
    if isinstance(matching, GAN):
        networks["critic"] = gaussians.discriminator()
    objective = Distillation(forcing, matching, generator_every=every)
    student = gaussians.train(objective, networks, gaussians.axes(objective.beside), steps, rates)
    return gaussians.divergence(networks["student"]), gaussians.divergence(student)


@pytest.mark.parametrize(
    "forcing, matching", [(forcing, DMD) for forcing in FORCINGS] + [("self", SiD), ("teacher", SiD)]
)
def test_score_distillation_reaches_the_teachers_distribution(forcing, matching):
    before, after = distilled(FORCINGS[forcing], matching(NoiseLaw(shift=1.0)))
    assert before > 1
    assert after < 0.02


@pytest.mark.parametrize(
    "forcing, matching",
    [("diffusion", GAN(NoiseLaw(0.3, 0.31), penalty_real=0.1, penalty_fake=0.1)),
     ("self", GAN(NoiseLaw(0.3, 0.31), relativistic=False))],
    ids=["relativistic, with penalties", "plain"],
)  # fmt: skip
def test_a_discriminator_reaches_the_data(forcing, matching):
    before, after = distilled(FORCINGS[forcing], matching, rates={"student": 0.02, "critic": 0.05}, every=1)
    assert before > 1
    assert after < 0.1


def test_consistency_reaches_the_teachers_distribution():
    networks = {"student": gaussians.beginner("student"), "teacher": gaussians.truth()}
    objective = Consistency(steps=48, shift=3.0)
    student = gaussians.train(objective, networks, gaussians.axes(beside=True), 1000, {"student": 0.02})
    assert gaussians.divergence(networks["student"]) > 1
    assert gaussians.divergence(student) < 0.02


def test_a_wrong_teacher_is_followed_to_the_wrong_place():
    """The student learns from the teacher's score, not from the data that pass by."""
    networks = {
        "student": gaussians.beginner("student"),
        "critic": gaussians.beginner(),
        "teacher": gaussians.beginner(),
    }
    objective = Distillation(DiffusionForcing(), DMD(NoiseLaw(shift=1.0)), generator_every=2)
    axis = gaussians.axes(times=(1000.0,))
    student = gaussians.train(objective, networks, axis, 200, RATES)
    assert gaussians.divergence(student) > 1


@pytest.mark.parametrize("simulated", [False, True], ids=["data", "simulated"])
def test_of_noised_data_the_second_of_two_like_chunks_loses_its_variety(simulated):
    """A first chunk made of noise cannot fit a second that is nearly data, but it fits one that was made after it."""
    forcing = DiffusionForcing(simulated=simulated)
    objective = Distillation(forcing, DMD(NoiseLaw(shift=1.0)), generator_every=4)
    found, true = gaussians.variety_of_second_chunk(objective, steps=3000)
    if simulated:
        assert 0.5 * true < found < 2 * true
    else:
        assert found < 0.1 * true

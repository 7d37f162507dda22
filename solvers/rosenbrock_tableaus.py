"""Coefficients of the Rosenbrock-W methods of PETSc, which PETSc does not tell.

The tests read every one of them off a step of PETSc's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["ROSENBROCK", "RosenbrockTableau"]

_LINEARIZED = "linearly implicit Euler rule and midpoint rule"
_VERWER = (
    "J. G. Verwer, E. J. Spee, J. G. Blom & W. Hundsdorfer, SIAM J. Sci. Comput. 20 (1999) "
    "1456-1480"
)
_RANG_ANGERMANN = "J. Rang & L. Angermann, BIT 45 (2005) 761-787"
_RANG_2015 = "J. Rang, J. Comput. Appl. Math. 286 (2015) 128-144"
_SANDU = "A. Sandu et al., Atmos. Environ. 31 (1997) 3459-3472"
_HAIRER_WANNER = (
    "E. Hairer & G. Wanner, Solving Ordinary Differential Equations II, section IV.7: the order "
    "conditions solved for the method's gamma and, as PETSc does, for alpha_2 = -2; not the "
    "coefficients of Table 7.2"
)
_PETSC = "PETSc's rosw.c"


@dataclass(frozen=True)
class RosenbrockTableau:
    """Coefficients of a Rosenbrock-W method.

    With J = g_u(t, u) and g_t = g_t(t, u), a step of length h from u at t is (Hairer & Wanner II,
    equation IV.7.4)::

        k_i = h g(t + alpha_i h, u + sum_j A_ij k_j) + h J sum_j Gamma_ij k_j + gamma_i h^2 g_t
        u'  = u + sum_i b_i k_i,      alpha_i = sum_j A_ij,      gamma_i = sum_j Gamma_ij

    Attributes
    ----------
    A : tuple of tuple of float
        The rows below the diagonal.
    Gamma : tuple of tuple of float
        The rows up to the diagonal.
    b : tuple of float
        Weights.
    reference : str
        Where they are from.
    """

    A: tuple[tuple[float, ...], ...]
    Gamma: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    reference: str

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.b)

    @property
    def alpha(self) -> tuple[float, ...]:
        """Abscissae, the row sums of A."""
        return tuple(map(sum, self.A))

    @property
    def gamma(self) -> tuple[float, ...]:
        """Row sums of Gamma."""
        return tuple(map(sum, self.Gamma))

    @property
    def one_matrix(self) -> bool:
        """Whether all stages have the same matrix, I / (h gamma) - J."""
        return len({row[-1] for row in self.Gamma}) == 1

    @property
    def needs_time_slope(self) -> bool:
        """Whether the order on y' = f(t, y) is lost without g_t.

        The methods of W type do not need it: sum b_i gamma_i = 0, and the conditions of higher
        order hold for any approximation of the Jacobian of the autonomous form.
        """
        defect = sum(b * gamma for b, gamma in zip(self.b, self.gamma, strict=True))
        return abs(defect) > 1e-12

    def transformed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return At, Ginv, Corr and bt for the variables Y = G k that PETSc solves for.

        G is Gamma with ones for zeros of its diagonal (explicit stages). A stage is then::

            Y_i / (h Gamma_ii) - J Y_i = g(t_i, Z_i) - sum_{j<i} Ginv_ij Y_j / h + gamma_i h g_t
            Y_i / h = g(t_i, Z_i) - sum_{j<i} Ginv_ij Y_j / h + J sum_j Corr_ij Y_j + gamma_i h g_t

        the second one for Gamma_ii = 0, both with Z_i = u + sum_j At_ij Y_j; u' = u + sum bt_i Y_i.
        """
        A, Gamma = (np.zeros((self.stages, self.stages)) for _ in range(2))
        for i in range(self.stages):
            A[i, :i], Gamma[i, : i + 1] = self.A[i], self.Gamma[i]
        inverse = np.linalg.inv(Gamma + np.diag((np.diag(Gamma) == 0.0).astype(float)))
        return A @ inverse, inverse, Gamma @ inverse, np.array(self.b) @ inverse


#: By PETSc's type.
ROSENBROCK: dict[str, RosenbrockTableau] = {
    "theta1": RosenbrockTableau(
        A=((),),
        Gamma=((1.0,),),
        b=(1.0,),
        reference=_LINEARIZED,
    ),
    "theta2": RosenbrockTableau(
        A=((),),
        Gamma=((0.5,),),
        b=(1.0,),
        reference=_LINEARIZED,
    ),
    "2m": RosenbrockTableau(
        A=((), (1.0,)),
        Gamma=((0.2928932188134525,), (-0.585786437626905, 0.2928932188134525)),
        b=(0.5, 0.5),
        reference=_VERWER,
    ),
    "2p": RosenbrockTableau(
        A=((), (1.0,)),
        Gamma=((1.7071067811865475,), (-3.414213562373095, 1.7071067811865475)),
        b=(0.5, 0.5),
        reference=_VERWER,
    ),
    "ra3pw": RosenbrockTableau(
        A=((), (1.5773502691896257,), (0.5, 0.0)),
        Gamma=(
            (0.7886751345948129,),
            (-1.5773502691896257, 0.7886751345948129),
            (-0.6707531754730548, -0.17075317547305482, 0.7886751345948129),
        ),
        b=(0.10566243270259355, 0.04903810567665797, 0.8452994616207484),
        reference=_RANG_ANGERMANN,
    ),
    "ra34pw2": RosenbrockTableau(
        A=((), (0.871733043016918,), (0.8445706001536942, -0.11299064236484185), (0.0, 0.0, 1.0)),
        Gamma=(
            (0.435866521508459,),
            (-0.871733043016918, 0.435866521508459),
            (-0.9033805701304408, 0.054180672388095326, 0.435866521508459),
            (0.24212380706095346, -1.2232505839045147, 0.5452602553351021, 0.435866521508459),
        ),
        b=(0.24212380706095346, -1.2232505839045147, 1.545260255335102, 0.435866521508459),
        reference=_RANG_ANGERMANN,
    ),
    "r34prw": RosenbrockTableau(
        A=(
            (),
            (0.871733043016918,),
            (1.4722022879435914, -0.3184025056809029),
            (0.8150519201669494, 0.5, -0.3150519201669494),
        ),
        Gamma=(
            (0.435866521508459,),
            (-0.871733043016918, 0.435866521508459),
            (-1.2855347382089872, 0.5050700554155069, 0.435866521508459),
            (-0.4820144918286435, 0.2179332607542295, -0.17178529043404503, 0.435866521508459),
        ),
        b=(0.3330374283383059, 0.7179332607542295, -0.4868372106009944, 0.435866521508459),
        reference=_RANG_2015,
    ),
    "r3prl2": RosenbrockTableau(
        A=((), (1.307599564525377,), (0.5, 0.5), (0.5, 0.5, 0.0)),
        Gamma=(
            (0.435866521508459,),
            (-1.307599564525377, 0.435866521508459),
            (-0.7098857586097217, -0.5599673596027777, 0.435866521508459),
            (-0.15550856807552085, -0.9538851657511223, 0.6735272123181841, 0.435866521508459),
        ),
        b=(0.3444914319244792, -0.4538851657511223, 0.6735272123181841, 0.435866521508459),
        reference=_RANG_2015,
    ),
    "rodas3": RosenbrockTableau(
        A=((), (0.0,), (1.0, 0.0), (0.75, -0.25, 0.5)),
        Gamma=((0.5,), (1.0, 0.5), (-0.25, -0.25, 0.5), (1 / 12, 1 / 12, -2 / 3, 0.5)),
        b=(5 / 6, -1 / 6, -1 / 6, 0.5),
        reference=_SANDU,
    ),
    "sandu3": RosenbrockTableau(
        A=((), (0.435866521508459,), (0.435866521508459, 0.0)),
        Gamma=(
            (0.435866521508459,),
            (-0.19294655696029095, 0.435866521508459),
            (0.0, 1.7492714812579468, 0.435866521508459),
        ),
        b=(-0.7545741238540432, 1.9410040706196443, -0.18642994676560104),
        reference=_SANDU,
    ),
    "assp3p3s1c": RosenbrockTableau(
        A=((), (1.0,), (0.25, 0.25)),
        Gamma=(
            (0.0,),
            (-0.7886751345948128, 0.7886751345948129),
            (-0.1971687836487032, -0.5915063509461096, 0.7886751345948129),
        ),
        b=(1 / 6, 1 / 6, 2 / 3),
        reference=_PETSC,
    ),
    "lassp3p4s2c": RosenbrockTableau(
        A=((), (0.5,), (0.5, 0.5), (1 / 6, 1 / 6, 1 / 6)),
        Gamma=((0.5,), (0.0, 0.25), (-2.0, -2 / 3, 2 / 3), (0.5, 5 / 36, -2 / 9, 0.0)),
        b=(1 / 6, 1 / 6, 1 / 6, 0.5),
        reference=_PETSC,
    ),
    "llssp3p4s2c": RosenbrockTableau(
        A=((), (0.5,), (0.5, 0.5), (1 / 6, 1 / 6, 1 / 6)),
        Gamma=((0.5,), (0.0, 0.75), (-2 / 3, -23 / 9, 2 / 9), (1 / 18, 65 / 108, -2 / 27, 0.0)),
        b=(1 / 6, 1 / 6, 1 / 6, 0.5),
        reference=_PETSC,
    ),
    "ark3": RosenbrockTableau(
        A=(
            (),
            (0.871733043016918,),
            (0.5275890119763004, 0.0724109880236996),
            (0.3990960076760701, -0.4375576546135194, 1.0384616469374492),
        ),
        Gamma=(
            (0.435866521508459,),
            (-1.9975278309349414, 0.435866521508459),
            (-1.0079485117950295, -0.004648958462629345, 0.435866521508459),
            (-0.6685429734233467, 0.6056625986449339, -0.9717899277217721, 0.0),
        ),
        b=(0.18764102434672383, -0.595297473576955, 0.9717899277217721, 0.435866521508459),
        reference=_PETSC,
    ),
    "rodaspr": RosenbrockTableau(
        A=(
            (),
            (0.75,),
            (0.07516287759386846, 0.024837122406131545),
            (1.653270888639651, 0.21545706385445562, -1.3157488872766792),
            (19.385003738039885, 1.2007117225835324, -19.33792405952279, -0.24779140110062559),
            (
                -7.3844531665375115,
                -0.30593419030174646,
                7.862207420937798,
                0.5781799359014597,
                0.25,
            ),
        ),
        Gamma=(
            (0.25,),
            (-0.75, 0.25),
            (-0.08864435907534994, -0.028688974257983398, 0.25),
            (-4.847003458533028, -0.31583244269672095, 4.953656836012322, 0.25),
            (-26.7694569045774, -1.5066459128852787, 27.20013148046059, 0.8259713370020852, 0.25),
            (
                6.587620649636142,
                0.3680705917299388,
                -6.742352069465812,
                -0.10619631475741095,
                -5 / 14,
                0.25,
            ),
        ),
        b=(
            -0.7968325169013701,
            0.062136401428192344,
            1.1198553514719862,
            0.47198362114404874,
            -3 / 28,
            0.25,
        ),
        reference=_RANG_2015,
    ),
    "rodaspr2": RosenbrockTableau(
        A=(
            (),
            (0.9375,),
            (-0.047145892646261345, 0.5453128665047112),
            (0.4691554389974224, 0.44490537602383673, -0.2249823933406112),
            (1.0950372887345903, 0.6322302345729438, -0.8923296609048582, 0.1650621375973241),
            (
                -0.1774658507363279,
                -0.5824141895260236,
                0.6818061258823817,
                0.7655739143799698,
                0.3125,
            ),
        ),
        Gamma=(
            (0.3125,),
            (-0.9375, 0.3125),
            (-0.09758057208599451, -0.5866632849996414, 0.3125),
            (-0.49407065013256957, -0.568197264289755, 0.5031894927416768, 0.3125),
            (
                -1.2725031394709183,
                -1.2146444240989676,
                1.5741357867872399,
                0.6005117767826458,
                0.3125,
            ),
            (
                0.6969074490142115,
                0.6223700573075643,
                -1.1553701989197045,
                0.18350029013386296,
                -0.6599075975359343,
                0.3125,
            ),
        ),
        b=(
            0.5194415982778836,
            0.0399558677815407,
            -0.4735640730373229,
            0.9490742045138328,
            -0.3474075975359343,
            0.3125,
        ),
        reference=_RANG_2015,
    ),
    "grk4t": RosenbrockTableau(
        A=(
            (),
            (-2.0,),
            (0.7328224652179106, 0.03081389841845298),
            (0.7328224652179106, 0.03081389841845298, 0.0),
        ),
        Gamma=(
            (0.231,),
            (5.586333319232342, 0.231),
            (-5.108575835796433, -0.5900022042491665, 0.231),
            (-0.2698524751797135, -0.028812184327885397, 0.005363636363636364, 0.231),
        ),
        b=(0.430791761148904, 0.00041118421052631577, 0.0, 0.5687970546405697),
        reference=_HAIRER_WANNER,
    ),
    "shamp4": RosenbrockTableau(
        A=(
            (),
            (-2.0,),
            (0.7396543951915853, 0.023981968444778363),
            (0.7396543951915853, 0.023981968444778363, 0.0),
        ),
        Gamma=(
            (0.5,),
            (-2.0, 0.5),
            (-0.28081971035519054, 0.04548304360216586, 0.5),
            (-0.4749336793934841, -0.022174714841882385, -29 / 110, 0.5),
        ),
        b=(0.430791761148904, 0.00041118421052631577, 0.0, 0.5687970546405697),
        reference=_HAIRER_WANNER,
    ),
    "veldd4": RosenbrockTableau(
        A=(
            (),
            (-2.0,),
            (0.7311588143119322, 0.032477549324431455),
            (0.7311588143119322, 0.032477549324431455, 0.0),
        ),
        Gamma=(
            (0.22570811482256822,),
            (5.527668414752787, 0.22570811482256822),
            (-2.4378858025400216, -0.3257186667850343, 0.22570811482256822),
            (-0.2641384822422112, -0.030472009722442663, 0.010655521541068129, 0.22570811482256822),
        ),
        b=(0.430791761148904, 0.00041118421052631577, 0.0, 0.5687970546405697),
        reference=_HAIRER_WANNER,
    ),
    "4l": RosenbrockTableau(
        A=(
            (),
            (-2.0,),
            (0.7219998437942118, 0.041636519842151824),
            (0.7219998437942118, 0.041636519842151824, 0.0),
        ),
        Gamma=(
            (0.57282,),
            (-1.6461168345338821, 0.57282),
            (-0.4185285823689844, 0.043613521355454855, 0.57282),
            (-0.5126868818860971, -0.039881907922201, -0.3364563636363636, 0.57282),
        ),
        b=(0.430791761148904, 0.00041118421052631577, 0.0, 0.5687970546405697),
        reference=_HAIRER_WANNER,
    ),
}

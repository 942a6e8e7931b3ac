"""Update rules: what one step of a row computes."""

from sparse_adam.rules.adagrad import AdagradMomentumRule as AdagradMomentumRule
from sparse_adam.rules.adagrad import AdagradRule as AdagradRule
from sparse_adam.rules.adagrad import RowWiseAdagradRule as RowWiseAdagradRule
from sparse_adam.rules.adam import AdamRule as AdamRule
from sparse_adam.rules.catch_up import catches_up as catches_up
from sparse_adam.rules.check import RuleFacts as RuleFacts
from sparse_adam.rules.check import check_rule as check_rule
from sparse_adam.rules.check import initial_slots as initial_slots
from sparse_adam.rules.ema import WithEMA as WithEMA
from sparse_adam.rules.ftrl import FTRLRule as FTRLRule
from sparse_adam.rules.limits import Limits as Limits
from sparse_adam.rules.limits import StepNumbers as StepNumbers
from sparse_adam.rules.limits import step_tile as step_tile
from sparse_adam.rules.rule import Slot as Slot
from sparse_adam.rules.rule import UpdateRule as UpdateRule
from sparse_adam.rules.rule import Values as Values
from sparse_adam.rules.sgd import SGDRule as SGDRule

//! BPF programs of allow-lists: a tree over the numbers of system calls, so that a call is judged in a few steps and not after one comparison for
//! each line of the list.
//!
//! ```text
//!  architecture? ─ other ─► kill        number ≥ middle? ─┬ no ──► … ─► number = n? ─ no ─► mismatch
//!                                                         └ yes ─► … ─► number = n? ─ yes ─► conditions ─► matched, or mismatch
//! ```
//!
//! The kernel runs a program once for each number when it is put in force, to know which calls need none of it, and does so for each thread: with
//! comparisons in a row that took a boot 3 ms more (exact lab). Called by `system_calls` alone; pure, and compared in a test with what the
//! seccompiler crate makes of the same list (seccomp(2), linux/filter.h, linux/seccomp.h).

use std::collections::BTreeMap;

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W,
    SECCOMP_RET_KILL_PROCESS,
};
use seccompiler::{BpfProgram, sock_filter};

/// AUDIT_ARCH_X86_64 (linux/audit.h).
const ARCHITECTURE: u32 = 0xc000_003e;
/// Offsets in `seccomp_data` (linux/seccomp.h).
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;

/// What the low half of an argument must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Condition {
    /// Which, 0 to 5.
    pub argument: u8,
    /// The bits that count.
    pub mask: u32,
    /// What they must be.
    pub value: u32,
}

/// A program that answers `matched` to the calls of these numbers for which one of their conditions holds, or that have none.
pub(super) fn assemble(rules: &BTreeMap<u32, Vec<Condition>>, mismatch: u32, matched: u32) -> BpfProgram {
    let mut program = vec![
        load(ARCHITECTURE_OFFSET),
        jump(BPF_JEQ, ARCHITECTURE, 1, 0),
        answer(SECCOMP_RET_KILL_PROCESS),
        load(NUMBER_OFFSET),
    ];
    let leaves: Vec<(u32, BpfProgram)> =
        rules.iter().map(|(number, conditions)| (*number, judge(conditions, mismatch, matched))).collect();
    program.extend(tree(&leaves, mismatch));
    program
}

/// What becomes of a number; the leaves are in their order.
fn tree(leaves: &[(u32, BpfProgram)], mismatch: u32) -> BpfProgram {
    match leaves {
        [] => vec![answer(mismatch)],
        [(number, leaf)] => [&[jump(BPF_JEQ, *number, 1, 0), answer(mismatch)], leaf.as_slice()].concat(),
        _ => {
            let (below, above) = leaves.split_at(leaves.len() / 2);
            let (lower, upper) = (tree(below, mismatch), tree(above, mismatch));
            // Conditional jumps reach 255 instructions, others any number.
            let over = u32::try_from(lower.len()).unwrap_or(u32::MAX);
            [&[jump(BPF_JGE, above[0].0, 0, 1), jump(BPF_JA, over, 0, 0)], lower.as_slice(), upper.as_slice()].concat()
        }
    }
}

fn judge(conditions: &[Condition], mismatch: u32, matched: u32) -> BpfProgram {
    let mut program = Vec::new();
    for Condition { argument, mask, value } in conditions {
        // The low half comes first: this machine is little-endian.
        program.push(load(ARGUMENTS_OFFSET + 8 * u32::from(*argument)));
        if *mask != u32::MAX {
            program.push(instruction(BPF_ALU | BPF_AND | BPF_K, *mask, 0, 0));
        }
        program.extend([jump(BPF_JEQ, *value, 0, 1), answer(matched)]);
    }
    program.push(answer(if conditions.is_empty() { matched } else { mismatch }));
    program
}

fn load(offset: u32) -> sock_filter {
    instruction(BPF_LD | BPF_W | BPF_ABS, offset, 0, 0)
}

fn jump(kind: u32, value: u32, if_true: u8, if_false: u8) -> sock_filter {
    instruction(BPF_JMP | kind | BPF_K, value, if_true, if_false)
}

fn answer(value: u32) -> sock_filter {
    instruction(BPF_RET | BPF_K, value, 0, 0)
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    // Codes have 16 bits.
    sock_filter { code: code as u16, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use seccompiler::{
        SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
    };

    use super::*;

    /// Runs a program as the kernel does; gives its answer and the steps it took.
    fn run(program: &[sock_filter], number: u32, arguments: [u64; 6]) -> (u32, usize) {
        let word = |offset: u32| match offset {
            NUMBER_OFFSET => number,
            ARCHITECTURE_OFFSET => ARCHITECTURE,
            _ => {
                let argument = arguments[(offset - ARGUMENTS_OFFSET) as usize / 8];
                if offset.is_multiple_of(8) { argument as u32 } else { (argument >> 32) as u32 }
            }
        };
        let (mut accumulator, mut at, mut steps) = (0u32, 0usize, 0);
        loop {
            let step = &program[at];
            (at, steps) = (at + 1, steps + 1);
            let mut take = |holds: bool| at += usize::from(if holds { step.jt } else { step.jf });
            match u32::from(step.code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => accumulator = word(step.k),
                code if code == BPF_JMP | BPF_JEQ | BPF_K => take(accumulator == step.k),
                code if code == BPF_JMP | BPF_JGE | BPF_K => take(accumulator >= step.k),
                code if code == BPF_JMP | BPF_JA => at += step.k as usize,
                code if code == BPF_ALU | BPF_AND | BPF_K => accumulator &= step.k,
                code if code == BPF_RET | BPF_K => return (step.k, steps),
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    /// The same list by the crate.
    fn reference(rules: &BTreeMap<u32, Vec<Condition>>) -> BpfProgram {
        let rule = |condition: &Condition| {
            let operator = match condition.mask {
                u32::MAX => SeccompCmpOp::Eq,
                mask => SeccompCmpOp::MaskedEq(mask.into()),
            };
            let length = SeccompCmpArgLen::Dword;
            let condition = SeccompCondition::new(condition.argument, length, operator, condition.value.into())
                .expect("a condition");
            SeccompRule::new(vec![condition]).expect("a rule")
        };
        let rules = rules.iter().map(|(number, all)| (i64::from(*number), all.iter().map(rule).collect())).collect();
        let (mismatch, matched) = (SeccompAction::Errno(1), SeccompAction::Allow);
        SeccompFilter::new(rules, mismatch, matched, TargetArch::x86_64)
            .expect("a filter")
            .try_into()
            .expect("a program")
    }

    fn assembled(rules: &BTreeMap<u32, Vec<Condition>>) -> BpfProgram {
        assemble(rules, SeccompAction::Errno(1).into(), SeccompAction::Allow.into())
    }

    proptest! {
        #[test]
        fn it_judges_as_the_crate_does(
            rules in prop::collection::btree_map(0u32..460, prop::collection::vec((0u8..6, prop_oneof![Just(u32::MAX), any::<u32>()], 0u32..4), 0..4), 1..120),
            calls in prop::collection::vec((0u32..470, prop::array::uniform6(prop_oneof![0u64..4, any::<u64>()])), 1..200),
        ) {
            let rules: BTreeMap<u32, Vec<Condition>> = rules.into_iter().map(|(number, all)| {
                (number, all.into_iter().map(|(argument, mask, value)| Condition { argument, mask, value: value & mask }).collect())
            }).collect();
            let (ours, theirs) = (assembled(&rules), reference(&rules));
            for (number, arguments) in calls {
                prop_assert_eq!(run(&ours, number, arguments).0, run(&theirs, number, arguments).0, "call {}", number);
            }
            // Those beyond the table, and x32's.
            for number in [u32::MAX, 0x4000_0000, 0x4000_0001] {
                prop_assert_eq!(run(&ours, number, [0; 6]).0, u32::from(SeccompAction::Errno(1)));
            }
        }
    }

    #[test]
    fn a_number_is_found_in_a_few_steps() {
        let rules: BTreeMap<u32, Vec<Condition>> = (0..120).map(|number| (number * 3, Vec::new())).collect();
        let (ours, theirs) = (assembled(&rules), reference(&rules));
        let steps = |program: &BpfProgram| (0..460).map(|number| run(program, number, [0; 6]).1).sum::<usize>();
        assert!(steps(&ours) * 8 < steps(&theirs), "{} and {} steps", steps(&ours), steps(&theirs));
    }
}

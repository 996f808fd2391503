//! The statistics: medians, the Hodges-Lehmann shift with its confidence interval, and the Wilcoxon-Mann-Whitney rank test, exact
//! for sets as small as those of starts, also where values are equal.

/// Values of each set that are looked at: the latest.
pub const MOST: usize = 20;

/// The middle value; that between the two in the middle if there are two. `None`: there are no values.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 { Some(upper) } else { Some((sorted.get(middle - 1)? + upper) / 2.0) }
}

/// How much larger `new` is than `base`: the median of all differences, and an interval that holds the true shift in about 95 of 100
/// cases (normal approximation of the rank).
pub fn shift(base: &[f64], new: &[f64]) -> Option<(f64, f64, f64)> {
    let mut differences: Vec<f64> =
        new.iter().flat_map(|new| base.iter().map(move |base| new - base)).collect();
    differences.sort_by(f64::total_cmp);
    let pairs = differences.len() as f64;
    let spread = (pairs * (base.len() + new.len() + 1) as f64 / 12.0).sqrt();
    let low = (pairs / 2.0 - 1.96 * spread).floor().max(0.0) as usize;
    let high = differences.len().checked_sub(low + 1)?;
    Some((median(&differences)?, *differences.get(low)?, *differences.get(high)?))
}

/// How likely `new` ranks as far above `base` as it does, or farther, if both are of the same kind (one-sided).
///
/// All ways to choose the new ones among all values are counted, with equal values sharing their ranks. Of each set at most
/// [`MOST`] values are taken.
pub fn p_larger(base: &[f64], new: &[f64]) -> f64 {
    let latest = |values: &[f64]| values.iter().rev().take(MOST).copied().collect::<Vec<f64>>();
    let (base, new) = (latest(base), latest(new));
    let all: Vec<f64> = base.iter().chain(&new).copied().collect();
    // Twice the middle rank, so that it is whole.
    let rank = |value: f64| {
        let below = all.iter().filter(|one| **one < value).count();
        let equal = all.iter().filter(|one| **one == value).count();
        2 * below + equal + 1
    };
    let ranks: Vec<usize> = all.iter().map(|value| rank(*value)).collect();
    let observed: usize = new.iter().map(|value| rank(*value)).sum();
    let most: usize = ranks.iter().sum();
    // ways[k][s]: how often k of the values seen so far have ranks that sum to s.
    let mut ways = vec![vec![0.0_f64; most + 1]; new.len() + 1];
    if let Some(first) = ways.first_mut().and_then(|none| none.first_mut()) {
        *first = 1.0;
    }
    let mut reach = 0;
    for rank in ranks {
        reach += rank;
        for count in (1..=new.len()).rev() {
            let (fewer, rest) = ways.split_at_mut(count);
            let (Some(fewer), Some(these)) = (fewer.last(), rest.first_mut()) else { continue };
            for (sum, before) in these.iter_mut().take(reach + 1).skip(rank).zip(fewer) {
                *sum += before;
            }
        }
    }
    let Some(ways) = ways.last() else { return 1.0 };
    let total: f64 = ways.iter().sum();
    let as_far: f64 = ways.iter().skip(observed).sum();
    if total > 0.0 { as_far / total } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn the_rank_test_is_exact() {
        let (low, high) = ([1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0]);
        // One of the 252 ways to choose five of ten; and all.
        assert!((p_larger(&low, &high) - 1.0 / 252.0).abs() < 1e-12);
        assert!((p_larger(&high, &low) - 1.0).abs() < 1e-12);
        // The new ones have ranks 3, 5 and 7: seven of the 35 ways to choose three of seven sum to 15 or more.
        let p = p_larger(&[1.1, 2.2, 3.3, 4.4], &[2.5, 3.5, 5.5]);
        assert!((p - 7.0 / 35.0).abs() < 1e-12, "{p}");
        // Equal values say nothing.
        assert!((p_larger(&[5.0; 6], &[5.0; 6]) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn shifts() {
        let (middle, low, high) =
            shift(&[1.0, 2.0, 3.0, 4.0, 5.0], &[11.0, 12.0, 13.0, 14.0, 15.0]).expect("a shift");
        assert!((middle - 10.0).abs() < 1e-12 && low < 10.0 && high > 10.0 && low >= 6.0 && high <= 14.0);
        assert_eq!(shift(&[], &[1.0]), None);
    }
}

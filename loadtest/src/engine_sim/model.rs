//! What the simulated engine says instead of a model: every token follows from all tokens before it.

/// Token ids are below this.
pub const VOCABULARY: u32 = 32_000;

/// Start of the token state: any number that is not a fixed point.
const TOKEN_SEED: u64 = 0x746f_6b65_6e73_3031;
/// Multiplier of the token state (2^64 / golden ratio, odd): spreads consecutive tokens over all bits.
const TOKEN_MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// Summary of all tokens so far, from which the next one follows.
#[derive(Clone, Copy, Debug)]
pub(super) struct TokenState(u64);

/// The token that the simulated model says after `tokens`.
pub fn next_token(tokens: &[u32]) -> u32 {
    TokenState::of(tokens).next_token()
}

/// The answer of `length` tokens that every simulated engine gives to a prompt.
pub fn answer(prompt: &[u32], length: u32) -> Vec<u32> {
    let mut state = TokenState::of(prompt);
    (0..length)
        .map(|_| {
            let token = state.next_token();
            state.push(token);
            token
        })
        .collect()
}

// === impl TokenState ===

impl TokenState {
    pub(super) fn of(tokens: &[u32]) -> Self {
        let mut state = Self(TOKEN_SEED);
        for token in tokens {
            state.push(*token);
        }
        state
    }

    pub(super) fn push(&mut self, token: u32) {
        self.0 = (self.0.rotate_left(5) ^ u64::from(token)).wrapping_mul(TOKEN_MULTIPLIER);
    }

    pub(super) fn next_token(self) -> u32 {
        ((self.0 >> 32) % u64::from(VOCABULARY)) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_continues_equally_wherever_the_prompt_ends() {
        let prompt: Vec<u32> = (0..10).collect();
        let whole = answer(&prompt, 6);
        let longer = [&prompt, &whole[..2]].concat();
        assert_eq!(answer(&longer, 4), whole[2..]);
        assert_eq!(next_token(&prompt), whole[0]);
        assert!(answer(&prompt, 1_000).iter().all(|token| *token < VOCABULARY));
    }
}

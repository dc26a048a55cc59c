import MLX

/// How a token is drawn: the likeliest at temperature 0, or else at random.
///
/// As in mlx-lm, `topP` chooses among the probabilities at temperature 1: the likeliest
/// tokens that together reach it. `MLXRandom.seed` makes draws repeatable.
public struct Sampling: Equatable, Sendable {
    public var temperature: Float
    public var topP: Float

    public static let greedy = Sampling(temperature: 0)

    public init(temperature: Float, topP: Float = 1) {
        (self.temperature, self.topP) = (temperature, topP)
    }

    /// The id of a token of logits (vocabulary,).
    func token(_ logits: MLXArray) throws -> Int {
        guard logits.max().item(Float.self).isFinite else { throw AnswerFailure.notFinite }
        guard temperature > 0 else { return argMax(logits, axis: -1).item(Int.self) }
        var logits = logits.asType(.float32)
        if topP > 0, topP < 1 {
            logits = which(isInNucleus(logits), logits, -Float.infinity)
        }
        return MLXRandom.categorical(logits / temperature).item(Int.self)
    }

    /// For each of the logits, whether likelier tokens have less than `topP` together.
    func isInNucleus(_ logits: MLXArray) -> MLXArray {
        let order = argSort(-logits, axis: -1)
        let probabilities = softmax(logits[order], axis: -1, precise: true)
        let before = cumsum(probabilities, axis: -1) - probabilities
        return (before .< topP)[argSort(order, axis: -1)]
    }
}

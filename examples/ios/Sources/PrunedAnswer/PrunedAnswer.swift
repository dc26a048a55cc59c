import Foundation
import MLX

/// The kept visual tokens of a picture, as `PrunedVision` gives them.
public struct VisualTokens: Sendable {
    /// K times hiddenSize numbers, past the projector, and their places among N tokens.
    public let features: [Float]
    public let keptIndices: [Int]
    /// N, the visual tokens before pruning: the product of the package's `grid`.
    public let total: Int

    public init(features: [Float], keptIndices: [Int], total: Int) {
        (self.features, self.keptIndices, self.total) = (features, keptIndices, total)
    }
}

/// A conversation about one picture, whose pruned cache is kept between questions.
///
///     let chat = PrunedAnswer(model: model, template: template, tokenizer: tokenizer)
///     let first = try await chat.ask("What is this?", about: visualTokens)
///     let second = try await chat.ask("What colour is it?")
public actor PrunedAnswer {

    /// Positions of kept visual tokens: those of the unpruned prompt, or without gaps.
    public enum Positions: String, Sendable { case original, contiguous }

    public enum FinishReason: String, Sendable { case stop, length, cancelled }

    public struct Answer: Sendable {
        public let text: String
        /// Includes the end token, if the model wrote one.
        public let tokenIds: [Int]
        public let finishReason: FinishReason
    }

    private static let chunk = 512  // prompt tokens that are read at once
    private let model: Qwen2Model
    private let template: PromptTemplate
    private let tokenizer: TextTokenizer
    private let positions: Positions
    private var caches: [LayerCache] = []
    /// Position of the next token.
    private var next = 0
    /// Tokens of the last answer that the caches do not hold.
    private var pending: [Int] = []

    public init(
        model: Qwen2Model, template: PromptTemplate, tokenizer: TextTokenizer,
        positions: Positions = .original
    ) {
        (self.model, self.template) = (model, template)
        (self.tokenizer, self.positions) = (tokenizer, positions)
    }

    /// Answers a question about a picture, or without one, a later question about it.
    ///
    /// `onText` gets the answer so far after each token. Cancelling the task ends the
    /// answer early. A question that throws leaves the conversation as it was.
    public func ask(
        _ question: String, about picture: VisualTokens? = nil,
        sampling: Sampling = .greedy, maxTokens: Int = 256,
        onText: @Sendable (String) -> Void = { _ in }
    ) throws -> Answer {
        let before = (caches, caches.first?.length ?? 0, next, pending)
        do {
            let logits = try picture.map { try begin(question, $0) } ?? goOn(question)
            return try answer(logits, sampling, maxTokens, onText)
        } catch {
            (caches, next, pending) = (before.0, before.2, before.3)
            caches.forEach { $0.trim(to: before.1) }
            throw error
        }
    }

    private func begin(_ question: String, _ picture: VisualTokens) throws -> MLXArray {
        let (ids, kept) = (try template.opening(question, tokenizer), picture.keptIndices)
        let channels = model.configuration.hiddenSize
        guard picture.features.count == kept.count * channels, !kept.isEmpty else {
            throw AnswerFailure.wrongFeatures(
                numbers: picture.features.count, kept: kept.count, channels: channels)
        }
        guard kept[0] >= 0, kept[kept.count - 1] < picture.total,
            zip(kept, kept.dropFirst()).allSatisfy({ $0 < $1 })
        else { throw AnswerFailure.keptOutside(total: picture.total) }
        let texts = try (model.embed(ids.0), model.embed(ids.1))
        let visual = MLXArray(picture.features, [kept.count, channels])
        let (start, isOriginal) = (ids.0.count, positions == .original)
        let end = start + (isOriginal ? picture.total : kept.count)
        let places = isOriginal ? kept.map { start + $0 } : Array(start..<end)
        caches = (0..<model.configuration.layers).map { _ in LayerCache() }
        return try read(
            concatenated([texts.0, visual.asType(texts.0.dtype), texts.1], axis: 0),
            at: Array(0..<start) + places + Array(end..<end + ids.1.count))
    }

    private func goOn(_ question: String) throws -> MLXArray {
        guard !caches.isEmpty else {
            throw AnswerFailure.badQuestion("the first question needs a picture")
        }
        let ids = pending + (try template.continuation(question, tokenizer))
        return try read(try model.embed(ids), at: Array(next..<next + ids.count))
    }

    /// Reads embeddings in chunks, so that a long prompt needs little memory.
    private func read(_ embeddings: MLXArray, at places: [Int]) throws -> MLXArray {
        let (count, context) = (places.count, model.configuration.context)
        guard places[count - 1] < context else {
            throw AnswerFailure.tooLong(tokens: places[count - 1] + 1, context: context)
        }
        var logits = MLXArray(0)
        for start in stride(from: 0, to: count, by: Self.chunk) {
            let part = start..<min(start + Self.chunk, count)
            let at = MLXArray(places[part].map(Int32.init))
            logits = model.read(embeddings[part], at: at, caches: caches)
            eval(logits)
        }
        (next, pending) = (places[count - 1] + 1, [])
        return logits
    }

    private func answer(
        _ first: MLXArray, _ sampling: Sampling, _ maxTokens: Int,
        _ onText: @Sendable (String) -> Void
    ) throws -> Answer {
        var (logits, ids, text) = (first, [Int](), "")
        while true {
            let id = try sampling.token(logits)
            ids.append(id)
            if template.endTokenIds.contains(id) {
                return Answer(text: text, tokenIds: ids, finishReason: .stop)
            }
            text = tokenizer.decode(ids)
            onText(text)
            let isFull = ids.count >= maxTokens || next >= model.configuration.context
            if isFull || Task.isCancelled {
                pending = [id]
                let reason: FinishReason = isFull ? .length : .cancelled
                return Answer(text: text, tokenIds: ids, finishReason: reason)
            }
            logits = try read(try model.embed([id]), at: [next])
        }
    }
}

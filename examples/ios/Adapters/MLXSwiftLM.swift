// An adapter to mlx-swift-lm, for an app that has its ChatSession already. Not part of the
// package: copy this file into the app's target, which imports PrunedAnswer and MLXLMCommon.
//
//     let container = try makeContainer(
//         folder: folder, template: template, tokenizer: tokenizer
//     ) { image in
//         let output = try await vision(vision.square(image.asCIImage()))
//         return VisualTokens(
//             features: output.features, keptIndices: output.keptIndices,
//             total: vision.function.grid.reduce(1, *))
//     }
//     let answer = try await ChatSession(container).respond(to: question, image: image)
//
// Written for mlx-swift-lm at 1441444. The idea to carry the shift between cache offset and
// position in `LMOutput.State` is that of its Qwen2-VL, which so carries its rope deltas.

import Foundation
import MLX
import MLXLMCommon
import MLXNN
import PrunedAnswer

/// mlx-swift-lm's cache of a layer, as `Qwen2Model.read` takes it.
private final class CacheAdapter: KeyValueCache {
    let inner: any KVCache
    init(_ inner: any KVCache) { self.inner = inner }
    func append(_ keys: MLXArray, _ values: MLXArray) -> (MLXArray, MLXArray) {
        inner.update(keys: keys, values: values)
    }
}

/// Position of the next token less the length of the cache.
private let shiftKey = LMOutput.Key<Int>("mlx_tokprune.shift")
/// Stands for a visual token among token ids: ChatSession counts ids against its cache.
private let imageId = -200

/// `Qwen2Model` with the kept visual tokens at their original positions.
final class PrunedFastVLM: Module, MLXLMCommon.LanguageModel, KVCacheDimensionProvider {
    private let model: Qwen2Model
    let kvHeads: [Int]

    init(_ model: Qwen2Model) {
        self.model = model
        let sizes = model.configuration
        kvHeads = Array(repeating: sizes.keyValueHeads, count: sizes.layers)
        super.init()
    }

    func prepare(
        _ input: LMInput, cache: [any KVCache], state: LMOutput.State?,
        prefill: PrefillParameters
    ) throws -> PrepareResult {
        let start = (cache.first?.offset ?? 0) + (state?[shiftKey] ?? 0)
        var (parts, positions, next) = ([MLXArray](), [Int](), start)
        func appendText(_ ids: ArraySlice<Int>) throws {
            guard !ids.isEmpty else { return }
            parts.append(try model.embed(Array(ids)))
            positions += next..<next + ids.count
            next += ids.count
        }
        var ids = input.text.tokens.flattened().asArray(Int32.self).map(Int.init)[...]
        if let image = input.image, let kept = image.positionIds, let frame = image.frames?.first,
            let place = ids.firstIndex(of: imageId)
        {
            try appendText(ids[..<place])
            parts.append(image.pixels)
            positions += kept.asArray(Int32.self).map { next + Int($0) }
            next += frame.product
            ids = ids[(place + kept.size)...]
        }
        try appendText(ids)
        let type = try model.embed([0]).dtype
        let embeddings = concatenated(parts.map { $0.asType(type) }, axis: 0)
        let places = MLXArray(positions.map(Int32.init))
        let caches = cache.map(CacheAdapter.init)
        let done = try prefill.forEachChunk(total: positions.count) { range in
            eval(model.read(embeddings[range], at: places[range], caches: caches))
        }
        let logits = model.read(embeddings[done...], at: places[done...], caches: caches)
        var after = LMOutput.State()
        after[shiftKey] = next - (cache.first?.offset ?? 0)
        prefill.progress?(positions.count, positions.count)
        return .logits(LMOutput(logits: logits[.newAxis, .newAxis], state: after))
    }

    func callAsFunction(
        _ input: LMInput.Text, cache: [any KVCache]?, state: LMOutput.State?
    ) -> LMOutput {
        let caches = cache ?? []
        let start = (caches.first?.offset ?? 0) + (state?[shiftKey] ?? 0)
        let ids = input.tokens.flattened().asArray(Int32.self).map(Int.init)
        guard let embeddings = try? model.embed(ids) else {
            fatalError("token ids \(ids) are not the model's")  // they came from its logits
        }
        let places = MLXArray((start..<start + ids.count).map(Int32.init))
        let logits = model.read(embeddings, at: places, caches: caches.map(CacheAdapter.init))
        return LMOutput(logits: logits[.newAxis, .newAxis], state: state)
    }
}

/// Writes a conversation about one picture with the template of a package.
struct PrunedProcessor: UserInputProcessor {
    let template: PromptTemplate
    /// Size of a visual token: the language model's hidden size.
    let channels: Int
    let tokenizer: any MLXLMCommon.Tokenizer
    let encode: @Sendable (UserInput.Image) async throws -> VisualTokens

    func prepare(input: UserInput) async throws -> LMInput {
        guard case .chat(let messages) = input.prompt, input.images.count == 1 else {
            throw AnswerFailure.badQuestion("expected a chat about one picture")
        }
        if messages.contains(where: { $0.role == .system }) {
            throw AnswerFailure.badQuestion("the package's template has a system prompt")
        }
        let visual = try await encode(input.images[0])
        var (text, questions) = ("", 0)
        for message in messages {
            guard message.role == .user else {
                text += message.content
                continue
            }
            text += (questions == 0 ? template.separator : template.turn)
            text += message.content + template.suffix
            questions += 1
        }
        let before = tokenizer.encode(text: template.prefix, addSpecialTokens: false)
        let after = tokenizer.encode(text: text, addSpecialTokens: false)
        let kept = visual.keptIndices.count
        guard kept > 0, visual.features.count == kept * channels else {
            throw AnswerFailure.wrongFeatures(
                numbers: visual.features.count, kept: kept, channels: channels)
        }
        let features = MLXArray(visual.features, [kept, channels])
        let visualIds = Array(repeating: imageId, count: kept)
        let ids = MLXArray((before + visualIds + after).map(Int32.init))
        return LMInput(
            text: .init(tokens: ids[.newAxis]),
            image: .init(
                pixels: features, positionIds: MLXArray(visual.keptIndices.map(Int32.init)),
                frames: [THW(1, 1, visual.total)]))
    }
}

/// A container for `ChatSession`, with the language model of a checkpoint folder.
func makeContainer(
    folder: URL, dtype: DType? = nil, template: PromptTemplate,
    tokenizer: any MLXLMCommon.Tokenizer,
    encode: @escaping @Sendable (UserInput.Image) async throws -> VisualTokens
) throws -> ModelContainer {
    let model = try Qwen2Model(folder: folder, dtype: dtype)
    let processor = PrunedProcessor(
        template: template, channels: model.configuration.hiddenSize, tokenizer: tokenizer,
        encode: encode)
    let configuration = ModelConfiguration(
        directory: folder, eosTokenIds: Set(template.endTokenIds))
    return ModelContainer(
        context: ModelContext(
            configuration: configuration, model: PrunedFastVLM(model), processor: processor,
            tokenizer: tokenizer))
}

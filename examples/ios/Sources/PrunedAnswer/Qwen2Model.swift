import Foundation
import MLX

/// Keys and values of one layer: takes those of new tokens, gives those of all.
public protocol KeyValueCache: AnyObject {
    func append(_ keys: MLXArray, _ values: MLXArray) -> (MLXArray, MLXArray)
}

/// Qwen2, the language model of FastVLM, with a position for each token.
///
/// Nothing in it changes after loading, so several conversations may share it.
public final class Qwen2Model: @unchecked Sendable {
    public let configuration: LanguageConfiguration
    private let embedding: Matrix
    private let head: Matrix?
    private let norm: MLXArray
    private let layers: [Layer]

    /// Loads the language model of a checkpoint folder; vision weights are not read.
    ///
    /// `dtype` replaces the stored type; iPhones compute in float16 or bfloat16.
    public init(folder: URL, dtype: DType? = nil) throws {
        configuration = try LanguageConfiguration(
            contentsOf: folder.appendingPathComponent("config.json"))
        let c = configuration
        let weights = try Weights(folder: folder, configuration: c, dtype: dtype)
        embedding = try weights.matrix(
            "model.embed_tokens", rows: c.vocabulary, columns: c.hiddenSize)
        let hasHead = !c.usesEmbeddingsAsHead && weights.has("lm_head.weight")
        head = hasHead
            ? try weights.matrix("lm_head", rows: c.vocabulary, columns: c.hiddenSize) : nil
        norm = try weights.array("model.norm.weight", [c.hiddenSize])
        layers = try (0..<c.layers).map { try Layer("model.layers.\($0)", weights, c) }
    }

    /// Embeddings (L, hiddenSize) of token ids.
    public func embed(_ ids: [Int]) throws -> MLXArray {
        if let id = ids.first(where: { !(0..<configuration.vocabulary).contains($0) }) {
            throw AnswerFailure.tokenOutside(id: id, vocabulary: configuration.vocabulary)
        }
        return embedding.rows(MLXArray(ids.map(Int32.init))).asType(norm.dtype)
    }

    /// Reads embeddings (L, hiddenSize) at positions (L,); returns the last one's logits.
    ///
    /// `caches` has one for each layer, and keeps what later calls attend to.
    public func read(
        _ embeddings: MLXArray, at positions: MLXArray, caches: [any KeyValueCache]
    ) -> MLXArray {
        var x = embeddings.expandedDimensions(axis: 0)
        for (layer, cache) in zip(layers, caches) {
            x = layer(x, at: positions, cache: cache)
        }
        let last = MLXFast.rmsNorm(x[0, -1], weight: norm, eps: configuration.normEpsilon)
        return (head ?? embedding)(last.expandedDimensions(axis: 0))[0]
    }
}

private struct Layer {
    let query, key, value, output, gate, up, down: Matrix
    let inputNorm, outputNorm: MLXArray
    let configuration: LanguageConfiguration

    init(_ name: String, _ weights: Weights, _ c: LanguageConfiguration) throws {
        let (hidden, wide, narrow) = (c.hiddenSize, c.feedForwardSize, c.keyValueHeads * c.headSize)
        func matrix(_ part: String, _ rows: Int, _ columns: Int, _ hasBias: Bool) throws -> Matrix {
            try weights.matrix("\(name).\(part)", rows: rows, columns: columns, hasBias: hasBias)
        }
        query = try matrix("self_attn.q_proj", hidden, hidden, true)
        key = try matrix("self_attn.k_proj", narrow, hidden, true)
        value = try matrix("self_attn.v_proj", narrow, hidden, true)
        output = try matrix("self_attn.o_proj", hidden, hidden, false)
        gate = try matrix("mlp.gate_proj", wide, hidden, false)
        up = try matrix("mlp.up_proj", wide, hidden, false)
        down = try matrix("mlp.down_proj", hidden, wide, false)
        inputNorm = try weights.array("\(name).input_layernorm.weight", [hidden])
        outputNorm = try weights.array("\(name).post_attention_layernorm.weight", [hidden])
        configuration = c
    }

    func callAsFunction(
        _ x: MLXArray, at positions: MLXArray, cache: any KeyValueCache
    ) -> MLXArray {
        let epsilon = configuration.normEpsilon
        let attended = x + attend(
            MLXFast.rmsNorm(x, weight: inputNorm, eps: epsilon), at: positions, cache: cache)
        let y = MLXFast.rmsNorm(attended, weight: outputNorm, eps: epsilon)
        let gated = gate(y)
        return attended + down(gated * sigmoid(gated) * up(y))
    }

    private func attend(
        _ x: MLXArray, at positions: MLXArray, cache: any KeyValueCache
    ) -> MLXArray {
        let (length, size) = (x.dim(1), configuration.headSize)
        let queries = rotated(query(x), heads: configuration.heads, at: positions)
        let (keys, values) = cache.append(
            rotated(key(x), heads: configuration.keyValueHeads, at: positions),
            value(x).reshaped(1, length, -1, size).transposed(0, 2, 1, 3))
        // The mask follows the order in the cache, which is that of the positions.
        let mixed = MLXFast.scaledDotProductAttention(
            queries: queries, keys: keys, values: values, scale: pow(Float(size), -0.5),
            mask: length > 1 ? .causal : .none)
        return output(mixed.transposed(0, 2, 1, 3).reshaped(1, length, -1))
    }

    /// MLX rotates each batch row by one offset, so every token becomes a row.
    private func rotated(_ x: MLXArray, heads: Int, at positions: MLXArray) -> MLXArray {
        let (length, size) = (x.dim(1), configuration.headSize)
        return MLXFast.RoPE(
            x.reshaped(length, heads, 1, size), dimensions: size, traditional: false,
            base: configuration.ropeBase, scale: 1, offset: positions
        ).reshaped(1, length, heads, size).transposed(0, 2, 1, 3)
    }
}

/// Keys and values (1, heads, S, d) in buffers that grow by `step` tokens.
final class LayerCache: KeyValueCache {
    private static let step = 256
    private(set) var length = 0
    private var keys: MLXArray?
    private var values: MLXArray?

    func append(_ newKeys: MLXArray, _ newValues: MLXArray) -> (MLXArray, MLXArray) {
        let (start, end) = (length, length + newKeys.dim(2))
        func joined(_ old: MLXArray?, _ new: MLXArray) -> MLXArray {
            var buffer = old ?? MLXArray.zeros([1, new.dim(1), 0, new.dim(3)], dtype: new.dtype)
            if end > buffer.dim(2) {
                let missing = (end + Self.step - 1) / Self.step * Self.step - buffer.dim(2)
                let zeros = MLXArray.zeros(
                    [1, new.dim(1), missing, new.dim(3)], dtype: new.dtype)
                buffer = concatenated([buffer, zeros], axis: 2)
            }
            buffer[0..., 0..., start..<end, 0...] = new
            return buffer
        }
        (keys, values, length) = (joined(keys, newKeys), joined(values, newValues), end)
        return (keys![0..., 0..., ..<end, 0...], values![0..., 0..., ..<end, 0...])
    }

    /// Forgets the tokens behind the first `length`.
    func trim(to length: Int) { self.length = min(self.length, length) }
}

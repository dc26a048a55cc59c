import CoreImage
import CoreML
import CoreVideo
import Foundation

/// A vision path that `mlx_tokprune.coreml` exported: tower, pruner and projector.
///
///     let vision = try await PrunedVision(contentsOf: url, keepRatio: 0.25)
///     let seen = try await vision(vision.square(picture))
///     // seen.features: K times C numbers for the language model
///
/// Nothing in it changes after loading, Core ML's asynchronous predictions may overlap,
/// and so may the renderings of a `CIContext`: hence Sendable, which not every SDK says
/// of the two classes.
public final class PrunedVision: @unchecked Sendable {

    /// What one function of a package does, as its metadata says.
    public struct Function: Decodable, Equatable, Sendable {
        public let name: String
        public let method: String
        public let keepRatio: Double?
        /// K, the visual tokens that it gives.
        public let keep: Int
        /// Rows and columns of all N visual tokens.
        public let grid: [Int]
        public let channels: Int
        /// Pixels per side of the picture that it takes.
        public let imageSize: Int
        /// Whether the features are past the projector.
        public let projector: Bool
        /// Whether the input is a picture, or else numbers.
        public let image: Bool
        /// N, the visual tokens before pruning.
        public var total: Int { grid.reduce(1, *) }
    }

    public struct Output: Sendable {
        /// K times C features, row by row, of the kept visual tokens in raster order.
        /// float32 whatever the package computes in: cast them to the language model's type.
        public let features: [Float]
        /// Which of the N visual tokens they are: their original places among them.
        public let keptIndices: [Int]
    }

    public enum Failure: Error, Equatable {
        case notFromMLXTokprune
        case noSuchFunction(String)
        case takesNumbers
        case wrongSize(expected: Int, width: Int, height: Int)
        case cannotDraw
    }

    public let function: Function
    /// The chat template around a picture, for `PromptTemplate` of PrunedAnswer; nil in a
    /// package of a policy or of an older exporter.
    public let prompt: String?
    private let model: MLModel
    /// Without colour management: the model was trained on pictures that Pillow resized in
    /// the numbers that they store, and a default context resizes in linear light.
    let context = CIContext(options: [.workingColorSpace: NSNull()])

    /// Loads a compiled package (`.mlmodelc`; Xcode and `MLModel.compileModel` make it).
    ///
    /// `keepRatio` chooses a function of a package with several, 1 the unpruned one, and
    /// `functionName` one by its name, such as `tokens_64`. Without either it is the first.
    public init(
        contentsOf url: URL, keepRatio: Double? = nil, functionName: String? = nil,
        computeUnits: MLComputeUnits = .all
    ) async throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = computeUnits
        configuration.functionName =
            functionName ?? keepRatio.map { Self.functionName(keepRatio: $0) }
        model = try await MLModel.load(contentsOf: url, configuration: configuration)
        function = try Self.choose(
            configuration.functionName, from: Self.functions(of: model))
        prompt = Self.metadata(of: model)?["mlx_tokprune_prompt"]
    }

    /// Sees and prunes a picture of `function.imageSize` pixels per side; see `square`.
    public func callAsFunction(_ picture: CVPixelBuffer) async throws -> Output {
        let side = function.imageSize
        let width = CVPixelBufferGetWidth(picture)
        let height = CVPixelBufferGetHeight(picture)
        guard width == side, height == side else {
            throw Failure.wrongSize(expected: side, width: width, height: height)
        }
        let input = try MLDictionaryFeatureProvider(dictionary: [
            "image": MLFeatureValue(pixelBuffer: picture)
        ])
        let output = try await model.prediction(from: input)
        guard let features = output.featureValue(for: "image_features")?.multiArrayValue,
            let indices = output.featureValue(for: "kept_indices")?.multiArrayValue
        else { throw Failure.notFromMLXTokprune }
        // A shaped array knows the strides; the memory of an MLMultiArray may be padded.
        return Output(
            features: MLShapedArray<Float>(converting: features).scalars,
            keptIndices: MLShapedArray<Int32>(converting: indices).scalars.map { Int($0) })
    }

    /// `keep_50` for 0.5 and `keep_12_5` for 0.125, as the exporter names them.
    public static func functionName(keepRatio: Double) -> String {
        guard keepRatio != 1 else { return "unpruned" }
        let percent = String(format: "%g", keepRatio * 100)
        return "keep_" + String(percent.map { ".-".contains($0) ? "_" : $0 })
    }

    /// The functions that the package of `model` says it has.
    static func functions(of model: MLModel) throws -> [Function] {
        guard let text = metadata(of: model)?["mlx_tokprune"] else {
            throw Failure.notFromMLXTokprune
        }
        return try decode(text)
    }

    private static func metadata(of model: MLModel) -> [String: String]? {
        model.modelDescription.metadata[.creatorDefinedKey] as? [String: String]
    }

    /// The function of this name, or the first, which Core ML loads when it is given none.
    static func choose(_ name: String?, from functions: [Function]) throws -> Function {
        guard let first = functions.first else { throw Failure.notFromMLXTokprune }
        let wanted = name ?? first.name
        guard let chosen = functions.first(where: { $0.name == wanted }) else {
            throw Failure.noSuchFunction(wanted)
        }
        guard chosen.image else { throw Failure.takesNumbers }
        return chosen
    }

    static func decode(_ text: String) throws -> [Function] {
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        return try decoder.decode([Function].self, from: Data(text.utf8))
    }
}

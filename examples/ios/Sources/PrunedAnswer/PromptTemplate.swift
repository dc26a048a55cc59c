import Foundation

/// The app's tokenizer: that of the checkpoint, such as one of swift-transformers.
public struct TextTokenizer: Sendable {
    /// Token ids of a text, whose special tokens are recognised and none of them added.
    public let encode: @Sendable (String) -> [Int]
    public let decode: @Sendable ([Int]) -> String

    public init(
        encode: @escaping @Sendable (String) -> [Int],
        decode: @escaping @Sendable ([Int]) -> String
    ) {
        (self.encode, self.decode) = (encode, decode)
    }
}

/// The chat template around a picture and questions, as a package's metadata has it.
public struct PromptTemplate: Decodable, Equatable, Sendable {
    /// Text before the visual tokens, and between them and the first question.
    public let prefix, separator: String
    /// Text behind each question, and between an answer and the next question.
    public let suffix, turn: String
    /// Mark of a picture in a text, which a question cannot hold.
    public let imageToken: String
    public let endTokenIds: [Int]

    /// Reads the metadata `mlx_tokprune_prompt`: `PrunedVision.prompt`.
    public init(json: String?) throws {
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        guard let json, let template = try? decoder.decode(Self.self, from: Data(json.utf8))
        else { throw AnswerFailure.unreadable(file: "the package's prompt") }
        self = template
    }

    /// Token ids before and behind the visual tokens.
    func opening(_ question: String, _ tokenizer: TextTokenizer) throws -> ([Int], [Int]) {
        try check(question)
        return (tokenizer.encode(prefix), tokenizer.encode(separator + question + suffix))
    }

    /// Token ids of a later question, from the end of an answer on.
    func continuation(_ question: String, _ tokenizer: TextTokenizer) throws -> [Int] {
        try check(question)
        return tokenizer.encode(turn + question + suffix)
    }

    private func check(_ question: String) throws {
        if question.allSatisfy(\.isWhitespace) {
            throw AnswerFailure.badQuestion("the question is empty; expected a text")
        }
        if question.contains(imageToken) {
            throw AnswerFailure.badQuestion(
                "a question cannot hold \(imageToken); the picture stands before the first one")
        }
    }
}

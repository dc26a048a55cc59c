import XCTest

@testable import PrunedVision

final class PrunedVisionTests: XCTestCase {
    func testFunctionNames() {
        XCTAssertEqual(PrunedVision.functionName(keepRatio: 0.5), "keep_50")
        XCTAssertEqual(PrunedVision.functionName(keepRatio: 0.125), "keep_12_5")
        XCTAssertEqual(PrunedVision.functionName(keepRatio: 1e-7), "keep_1e_05")
        XCTAssertEqual(PrunedVision.functionName(keepRatio: 1), "unpruned")
    }

    let metadata = """
        [{"name": "keep_50", "method": "norm", "keep_ratio": 0.5, "keep": 128,
          "grid": [16, 16], "channels": 896, "image_size": 1024,
          "projector": true, "image": true},
         {"name": "unpruned", "method": "none", "keep_ratio": null, "keep": 256,
          "grid": [16, 16], "channels": 896, "image_size": 1024,
          "projector": true, "image": true}]
        """

    func testMetadata() throws {
        let functions = try PrunedVision.decode(metadata)
        XCTAssertEqual(functions.map(\.name), ["keep_50", "unpruned"])
        XCTAssertEqual(functions.map(\.keep), [128, 256])
        XCTAssertEqual(functions.map(\.imageSize), [1024, 1024])
        XCTAssertEqual(functions[0].keepRatio, 0.5)
        XCTAssertNil(functions[1].keepRatio)
    }

    func testChoice() throws {
        let functions = try PrunedVision.decode(metadata)
        XCTAssertEqual(try PrunedVision.choose(nil, from: functions).name, "keep_50")
        XCTAssertEqual(try PrunedVision.choose("unpruned", from: functions).keep, 256)
        XCTAssertThrowsError(try PrunedVision.choose("keep_25", from: functions)) {
            XCTAssertEqual($0 as? PrunedVision.Failure, .noSuchFunction("keep_25"))
        }
        XCTAssertThrowsError(try PrunedVision.choose(nil, from: [])) {
            XCTAssertEqual($0 as? PrunedVision.Failure, .notFromMLXTokprune)
        }
        let numbers = metadata.replacingOccurrences(of: #""image": true"#, with: #""image": false"#)
        XCTAssertThrowsError(try PrunedVision.choose(nil, from: PrunedVision.decode(numbers))) {
            XCTAssertEqual($0 as? PrunedVision.Failure, .takesNumbers)
        }
    }

    func testLongerSideFillsTheSquare() {
        XCTAssert(PrunedVision.fitted(CGSize(width: 4032, height: 3024), side: 1024) == (1024, 768))
        XCTAssert(PrunedVision.fitted(CGSize(width: 300, height: 600), side: 1024) == (512, 1024))
    }
}

// swift-tools-version: 5.10
import PackageDescription

let package = Package(
    name: "PrunedVision",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [.library(name: "PrunedVision", targets: ["PrunedVision"])],
    targets: [
        .target(name: "PrunedVision"),
        .testTarget(name: "PrunedVisionTests", dependencies: ["PrunedVision"]),
    ]
)

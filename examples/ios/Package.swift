// swift-tools-version: 6.0
import PackageDescription

let package = Package(
    name: "PrunedVision",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [.library(name: "PrunedVision", targets: ["PrunedVision"])],
    targets: [
        .target(name: "PrunedVision"),
        .testTarget(name: "PrunedVisionTests", dependencies: ["PrunedVision"]),
    ],
    // Mode 6 would make errors of Apple's annotations, which differ between SDKs.
    swiftLanguageModes: [.v5]
)

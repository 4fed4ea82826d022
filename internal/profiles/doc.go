// Package profiles brings what one node has learnt about an image's starts to the others: profiles beside images in registries.
//
// A Sharer looks for profiles beside each pull, and has package prefetch learn them; a pull never waits for it. A profile that has
// ripened on the node is pushed beside the image, with the credentials that the node has, to registries that it may write to. A
// Service is nodeagent's ProfileService: profiles on purpose, and what reading ahead was worth.
//
// Profiles come from whoever may push to an image's repository. They are hints: bounded in size and number where they are read
// (package registry), and checked where they are learnt (package prefetch).
package profiles

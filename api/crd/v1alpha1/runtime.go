package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Runtime is a language environment that is booted before any Function is known. WarmPools say how many booted Instances wait where.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=rt,categories=hearth
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Warm",type=integer,JSONPath=`.status.warm`
// +kubebuilder:printcolumn:name="Image",type=string,JSONPath=`.spec.image`
// +kubebuilder:printcolumn:name="Error",type=string,priority=1,JSONPath=`.status.error`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.matches('^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$')",message="metadata.name: must be a DNS label (a-z, 0-9 and -) of at most 40 bytes; for example python"
type Runtime struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`
	// Spec is what is booted.
	// +required
	Spec RuntimeSpec `json:"spec"`
	// Status is what Hearth says of it.
	// +optional
	Status RuntimeStatus `json:"status,omitempty"`
}

// RuntimeSpec is what is booted. A change replaces the Instances that wait; those that serve go on with what they began with.
type RuntimeSpec struct {
	// Image whose entrypoint is a loader. It is resolved to a digest once for each generation.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:XValidation:rule="self.matches('^[!-~]+$')",message="must be an image reference, without blanks; for example registry.example/runtimes/python:1"
	Image string `json:"image"`
	// Preload names libraries that the loader loads while it boots, in the language's own terms: modules of Python or Node, classes of
	// Java.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=1000
	Preload []Library `json:"preload,omitempty"`
	// Env is the loader's environment, which Functions in it see too.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=1000
	Env []EnvVar `json:"env,omitempty"`
}

// Library that a loader loads while it boots.
//
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=1024
// +kubebuilder:validation:XValidation:rule="self.matches('^[^,\\\\pC]+$')",message="must be a library's name, printable and without a comma; for example numpy"
type Library string

// RuntimeStatus is what Hearth says of a Runtime.
type RuntimeStatus struct {
	// Conditions: Accepted (this spec is taken over) and Ready (it boots on the nodes that want it).
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// ObservedGeneration of the spec that this status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Image by digest, once a node has resolved it.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Image string `json:"image,omitempty"`
	// Language that it is, with the version, by its loader's account, like "python 3.11.2"; empty until one has booted.
	// +optional
	Language string `json:"language,omitempty"`
	// Warm Instances of this generation that wait, on all nodes.
	// +optional
	Warm int32 `json:"warm"`
	// Error says why one last did not boot, and on which node; empty when they boot.
	// +optional
	Error string `json:"error,omitempty"`
}

// RuntimeList is what the API server answers to a list.
//
// +kubebuilder:object:root=true
type RuntimeList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Runtime `json:"items"`
}

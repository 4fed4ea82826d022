package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// WarmPool says how many Instances of which warmth wait for a Function, and on which nodes. Where several cover a node, their sizes add up.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:subresource:scale:specpath=.spec.size,statuspath=.status.size,selectorpath=.status.selector
// +kubebuilder:resource:shortName=wp,categories=hearth
// +kubebuilder:printcolumn:name="Runtime",type=string,JSONPath=`.spec.runtime`
// +kubebuilder:printcolumn:name="Size",type=integer,JSONPath=`.spec.size`
// +kubebuilder:printcolumn:name="Nodes",type=integer,JSONPath=`.status.nodes`
// +kubebuilder:printcolumn:name="Warm",type=integer,JSONPath=`.status.warm`
// +kubebuilder:printcolumn:name="Desired",type=integer,JSONPath=`.status.desired`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.matches('^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$')",message="metadata.name: must be a DNS label (a-z, 0-9 and -) of at most 40 bytes; for example python"
type WarmPool struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`
	// Spec is what should wait where.
	// +required
	Spec WarmPoolSpec `json:"spec"`
	// Status is what waits.
	// +optional
	Status WarmPoolStatus `json:"status,omitempty"`
}

// WarmPoolSpec is what should wait where.
type WarmPoolSpec struct {
	// Runtime by name that is booted in what waits. Empty is sandboxes, which any image can be started in.
	// +optional
	// +kubebuilder:validation:MinLength=1
	Runtime Name `json:"runtime,omitempty"`
	// Size is how many Instances wait on each node. This is what `kubectl scale` changes.
	// +optional
	// +kubebuilder:default=3
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000
	Size *int32 `json:"size,omitempty"`
	// NodeSelector says which nodes it covers, by their labels. Empty is all that run nodeagent.
	// +optional
	// +kubebuilder:validation:MaxProperties=100
	NodeSelector map[string]string `json:"nodeSelector,omitempty"`
	// Tolerations let it cover nodes whose taints keep other pods away.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=100
	Tolerations []corev1.Toleration `json:"tolerations,omitempty"`
	// Resources that the pod of one waiting Instance requests from its node, so that the scheduler counts it.
	// +optional
	Resources Resources `json:"resources,omitzero"`
	// Images to have on these nodes ahead: of Functions, or packages of code.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=1000
	Images []ImageReference `json:"images,omitempty"`
	// Headroom is how many low-priority placeholder pods keep room free for more Instances, on all of these nodes together. They are
	// preempted when room is needed, and have the cluster's autoscaler add nodes ahead.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000
	Headroom int32 `json:"headroom,omitempty"`
}

// ImageReference names an image as containerd accepts it.
//
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=1024
// +kubebuilder:validation:XValidation:rule="self.matches('^[!-~]+$')",message="must be an image reference, without blanks; for example registry.example/hello:1"
type ImageReference string

// WarmPoolStatus is what waits.
type WarmPoolStatus struct {
	// Conditions: Accepted (this spec is taken over) and Ready (as many wait as should, on every node).
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// ObservedGeneration of the spec that this status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Size that each node was told to keep; the scale subresource shows it.
	// +optional
	Size int32 `json:"size"`
	// Selector of the pods that wait, in the form of a label selector; for the scale subresource.
	// +optional
	Selector string `json:"selector,omitempty"`
	// Nodes that it covers now.
	// +optional
	Nodes int32 `json:"nodes"`
	// Warm Instances that wait, on all nodes.
	// +optional
	Warm int32 `json:"warm"`
	// Desired Instances that should wait, on all nodes.
	// +optional
	Desired int32 `json:"desired"`
}

// Instances is spec.size, or its default where no API server has filled it in.
func (s *WarmPoolSpec) Instances() int32 {
	if s.Size == nil {
		return DefaultPoolSize
	}
	return *s.Size
}

// DefaultPoolSize is what spec.size is if it is left out.
const DefaultPoolSize = 3

// WarmPoolList is what the API server answers to a list.
//
// +kubebuilder:object:root=true
type WarmPoolList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []WarmPool `json:"items"`
}

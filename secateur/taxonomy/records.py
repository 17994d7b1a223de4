"""The records of the 50 published systems, as two tables joined by `spec`, and of the baselines beside them, by name.

Notation: `-` not applicable, `a/b` alternatives, `a+b` combined, `either` both and `any` all members of an axis.
`exact`: the method meets its budget to the unit, rather than through a threshold, a penalty or a learned count.
The classification is a reading of abstracts and specs. The axes and letters are those of Cheng et al., "A Survey on
Deep Neural Network Pruning: Taxonomy, Comparison, Analysis, and Recommendations", arXiv 2308.06767, extended from
parameters to tokens, attention blocks, windows and saliency maps.
"""

CLASSIFICATION = """
| # | title (short) | spec | object | granularity | speed-up | when | how | order | data | start | recovery | task | decision | scope | fusion |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 1 | EfficientLLM (pruning-aware pretraining) | efficientllm | C N H | struct | univ | PDT | SAL | iter | data | pre | train | orig | stat | glob | arch |
| 2 | VFlowOpt | vflowopt | T | token | univ | RT | ATT+ENT | iter | calib | pre | none | orig | dyn | loc | merge,search |
| 3 | FoPru | fopru | T | token | univ | RT | ATT | shot | input | pre | none | orig | dyn | loc | - |
| 4 | CoViPAL | covipal | T | token | univ | RT | GATE | iter | data | pre | module | orig | dyn | loc | - |
| 5 | FlowCut | flowcut | T | token | univ | RT | ATT+VAL | iter | input | pre | none | orig | dyn | loc | - |
| 6 | FEATHER (Feather the Throttle) | feather | T | token | univ | RT | ATT+UNI | iter | input | pre | none | orig | dyn | loc | - |
| 7 | HoloV (Don't Just Chase Highlighted Tokens) | holov | T | token | univ | RT | ATT+DIV | shot | input | pre | none | orig | dyn | loc | - |
| 8 | ATP-LLaVA | atp-llava | T | token | univ | RT | GATE | iter | data | pre | train | orig | dyn | loc | - |
| 9 | ConnNet | connnet | S | none | none | none | none | - | data | pre | train | orig | - | - | - |
| 10 | CATP (multimodal in-context) | catp | T | token | univ | RT | DIV+ATT | iter | input | pre | none | orig | dyn | loc | - |
| 11 | DToP (plain ViT segmentation) | dtop | T | token | univ | RT | CONF | iter | data | pre | tune | orig | dyn | loc | early exit |
| 12 | NormGrad (There and Back Again) | normgrad | S | none | none | none | SAL | - | input | pre | none | - | - | - | - |
| 13 | VLA-Pruner | vla-pruner | T | token | univ | RT | ATT+DIV | shot | input | pre | none | orig | dyn | loc | - |
| 14 | ToDRE | todre | T | token | univ | RT | DIV+ATT | iter | input | pre | none | orig | dyn | loc | - |
| 15 | VisionDrop (cross-modal misalignment) | visiondrop | T | token | univ | RT | ATT | iter | input | pre | none | orig | dyn | loc | merge |
| 16 | Consensus sub-network | consensus-subnetwork | L C | struct | univ | PDT | GATE | iter | data | either | train | orig | stat | glob | - |
| 17 | Understanding Robustness Lottery | robustness-lottery | tool | none | none | none | none | - | data | pre | none | - | - | - | - |
| 18 | Pruning by Explaining (LRP) | lrp-pruning | F N | struct | univ | PAT | SAL | iter | data | pre | tune | transf | stat | glob | - |
| 19 | VTrans (variational bottleneck) | vtrans | H N L E | struct | univ | PAT | REG | iter | data | pre | train | transf | stat | glob | KD |
| 20 | Recoverable Compression | recoverable-compression | T | token | univ | RT | ATT+TXT | shot | input | pre | none | orig | dyn | loc | merge |
| 21 | Token Pruning in Vision SSMs | top-vim | T | token | univ | RT | ACT | iter | data | pre | tune | orig | dyn | loc | - |
| 22 | Structurally Prune Anything (SPA) | spa | C | struct | univ | any | LOSS+any | either | free/data | either | tune/none | orig | stat | glob | - |
| 23 | NIRVANA | nirvana | H N | struct | univ | PAT-PT | SAL | shot | calib | pre | none/LoRA | orig | stat | glob | - |
| 24 | Stabilizing the LTH (rewinding) | lottery-rewinding | W | unstr | spec | PAT | MAG | iter | free | early | train | orig | stat | glob | - |
| 25 | TransPrune | transprune | T | token | univ | RT | ACT+ATT | iter | input | pre | none | orig | dyn | loc | - |
| 26 | Meta Pruning via Graph Metanetworks | metapruning | C | struct | univ | PAT | GNN+META | shot | data | pre | tune | orig | stat | glob | - |
| 27 | LVLM_CSP | lvlm-csp | T | token | univ | RT | CLU+ATT | iter | input | pre | none | orig | dyn | loc | cluster |
| 28 | Tyr-the-Pruner | tyr | H N | struct | univ | PAT-PT | LOSS | iter | calib | pre | none | orig | stat | glob | search |
| 29 | Efficient Pruning of Text-to-Image Models (SD2) | sd-prune | W | unstr | spec | PAT-PT | MAG | shot | free | pre | none | orig | stat | per part | - |
| 30 | LRS-VQA / Dynamic Image Pyramid | lrs-dip | T Win | token | univ | RT | GATE | iter | data | pre | module | orig | dyn | loc | KD |
| 31 | HiPrune | hiprune | T | token | univ | RT | ATT | shot | input | pre | none | orig | dyn | loc | - |
| 32 | ECoFLaP | ecoflap | W | unstr | spec | PAT-PT | LOSS | shot | calib | pre | none | orig | stat | glob->loc | - |
| 33 | FasterVLM ([CLS] Attention) | fastervlm | T | token | univ | RT | ATT | shot | input | pre | none | orig | dyn | loc | - |
| 34 | DivPrune | divprune | T | token | univ | RT | DIV | shot | input | pre | none | orig | dyn | loc | - |
| 35 | Visual Dependency Transformers | dependency-vit | T | token | univ | PDT+RT | ATT | iter | data | scratch | train | orig | dyn | loc | merge |
| 36 | MaskSparsity (pruning-aware regularization) | masksparsity | C | struct | univ | PDT | REG | shot | data | pre | tune | orig | stat | glob | - |
| 37 | DiSa | disa | P | token | none | PDT | TXT | shot | data | pre | train | transf | dyn | loc | KD |
| 38 | A Survey on DNN Pruning | survey-taxonomy | tool | none | none | none | none | - | - | - | - | - | - | - | - |
| 39 | TAS (transformable architecture search) | tas | C L | struct | univ | PAT | REG | iter | data | scratch | train | orig | stat | glob | NAS,KD |
| 40 | MMTok | mmtok | T | token | univ | RT | COV+TXT | shot | input | pre | none | orig | dyn | loc | - |
| 41 | LMD-ViT (adaptive window pruning) | lmd-vit | Win | token | univ | RT | GATE | iter | data | scratch | train | orig | dyn | loc | - |
| 42 | The Lottery Ticket Hypothesis | lottery-ticket | W | unstr | spec | PAT | MAG | iter | free | init | train | orig | stat | loc/glob | - |
| 43 | EcoDiff (Effortless Efficiency) | ecodiff | H N B | struct | univ | PAT-PT | REG | shot | calib | pre | none | orig | stat | glob | - |
| 44 | PAGCP (multitask channel pruning) | pagcp | C | struct | univ | PAT | LOSS | iter | data | pre | tune | orig | stat | glob | - |
| 45 | Pluralistic Salient Object Detection | psod | S | none | none | none | none | - | data | pre | train | orig | - | - | - |
| 46 | ISS-P (iterative soft shrinkage) | iss-p | W | unstr/N:M | spec | PDT | MAG | iter | free | init | train | orig | stat | loc | - |
| 47 | PSA (pyramid sparse attention) | psa | A | block | spec | RT | ATT | shot | input | pre | none | orig | dyn | loc | merge |
| 48 | AdaToken-3D | adatoken-3d | T | token | univ | RT | ATT | iter | calib | pre | none | orig | dyn | loc | - |
| 49 | Treat Visual Tokens as Text? (YOPO) | yopo | A H L N | struct | mixed | PAT | ACT | shot | calib | pre | tune/none | orig | stat | loc | - |
| 50 | Beyond saliency (SR map) | salient-relevance | S | none | none | none | SAL | - | input | pre | none | - | - | - | - |
"""

DETAILS = """
| spec | year | arXiv | stages | supervision | models | exact | unit | code | description |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| efficientllm | 2025 | 2502.06663 | 1 | self | llm | yes | params | Xingrun-Xing2/EfficientLLM | Continued pretraining that removes one head, neuron or stem channel at a time by a single saliency. |
| vflowopt | 2025 | 2508.05211 | 3 | unsupervised | vlm | yes | tokens | sihany077/VFlowOpt | Drops visual tokens by attention and entropy in three stages whose ratios are found by Bayesian search. |
| fopru | 2024 | 2411.14164 | 1 | unsupervised | vlm | yes | tokens | - | Keeps the patches, or whole rows of patches, that the vision encoder attends to most. |
| covipal | 2025 | 2508.17243 | 1 | supervised | vlm | yes | tokens | tyxqc/CoViPAL | A small trained module scores visual tokens in shallow layers as deeper layers would. |
| flowcut | 2025 | 2505.19536 | 12 | unsupervised | vlm | no | tokens | TungChintao/FlowCut | Drops tokens inside the vision encoder by a running mean of attention, value similarity and value norm. |
| feather | 2024 | 2412.13180 | 2 | unsupervised | vlm | no | tokens | markendo/FEATHER | Attention of the last prompt token without rotary bias, with a uniform grid, at two depths of the language model. |
| holov | 2025 | 2510.02912 | 1 | unsupervised | vlm | yes | tokens | obananas/HoloV | Gives every crop of the image a quota of tokens and keeps the best inside each. |
| atp-llava | 2024 | 2412.00447 | 3 | supervised | vlm | no | tokens | - | Modules between decoder layers learn, for each input, two thresholds on attention and spatial scores. |
| connnet | 2018 | 1804.07836 | 1 | supervised | cnn | - | - | - | Predicts for each pixel whether its neighbours belong to the same salient object. |
| catp | 2025 | 2508.07871 | 2 | unsupervised | vlm | yes | tokens | - | Prunes the images of multimodal in-context prompts by coverage, then by relevance to the query. |
| dtop | 2023 | 2308.01045 | 3 | supervised | vit | no | tokens | zbwxp/Dynamic-Token-Pruning | Segmentation tokens that an auxiliary head is already sure of leave the network early. |
| normgrad | 2020 | 2004.02866 | 1 | unsupervised | cnn | - | - | srebuffi/revisiting_saliency | Saliency of a location: its share in the gradient of an imaginary identity layer. |
| vla-pruner | 2025 | 2511.16449 | 1 | unsupervised | vla | yes | tokens | MINT-SJTU/VLA-Pruner | Unites tokens needed for reading and, from past control steps, for acting, and thins them by diversity. |
| todre | 2025 | 2505.18757 | 2 | unsupervised | vlm | no | tokens | - | Keeps dissimilar visual tokens, then drops all of them in a deep layer where text no longer looks at them. |
| visiondrop | 2025 | 2506.22283 | 4 | unsupervised | vlm | yes | tokens | Ruixxxx/VisionDrop | Ranks visual tokens by image-to-image attention at four depths and merges the rest. |
| consensus-subnetwork | 2023 | 2302.10798 | 1 | supervised | cnn | no | layers | - | Input-dependent gates are polarised during one training run until all inputs agree on one static sub-network. |
| robustness-lottery | 2022 | 2206.07918 | 1 | supervised | cnn | - | - | - | Compares pruned classifiers through the angle, norm and margin of their last features. |
| lrp-pruning | 2019 | 1912.08881 | 1 | supervised | mlp cnn | yes | units | seulkiyeom/LRP_pruning | Removes the filters and units that receive the least relevance from the correct class. |
| vtrans | 2024 | 2406.05276 | 1 | supervised | bert llm | no | params | - | Stochastic masks with a variational information bottleneck and a Lagrangian for the size. |
| recoverable-compression | 2024 | 2409.01179 | 1 | unsupervised | vlm | no | tokens | banjiuyufen/Recoverable-Compression | Keeps attention outliers, recovers tokens similar to the question, and merges what is left. |
| top-vim | 2024 | 2409.18962 | 3 | supervised | ssm | yes | tokens | ZLKong/ToP-ViM | Drops tokens of state space models and lets the scan pass through their positions. |
| spa | 2024 | 2403.18955 | 1 | supervised/unsupervised | any | yes | units | - | Finds coupled channels by mask propagation, lifts any criterion to them and, as OBSPA, repairs in closed form. |
| nirvana | 2025 | 2509.14230 | 1 | unsupervised | llm | yes | params | iDEA-iSAIL-Lab-UIUC/NIRVANA | Weight times gradient of the output, summed over KV groups and MLP neurons and ranked globally. |
| lottery-rewinding | 2019 | 1903.01611 | 1 | supervised | cnn | yes | weights | facebookresearch/open_lth | Iterative magnitude pruning that returns survivors to their values early in training. |
| transprune | 2025 | 2507.20630 | 3 | unsupervised | vlm | yes | tokens | liaolea/TransPrune | Tokens that the modules change most, in length and direction, and that instructions attend to, stay. |
| metapruning | 2025 | 2506.12041 | 1 | supervised | cnn vit | no | macs | Yewei-Liu/MetaPruning | A graph metanetwork rewrites the weights so that ordinary group-norm pruning hurts less. |
| lvlm-csp | 2025 | 2504.10854 | 3 | unsupervised | vlm | yes | tokens | - | Few cluster tokens, then all, then those that the segmentation token attends to, over depth. |
| tyr | 2025 | 2503.09657 | 4 | unsupervised | llm | yes | units | AMD-AGI/Tyr-the-Pruner | Evolutionary search picks one locally pruned and repaired version of every sublayer by KL to the dense model. |
| sd-prune | 2024 | 2411.15113 | 1 | unsupervised | diffusion | yes | weights | - | Magnitude pruning of text encoder and image generator, each at its own ratio. |
| lrs-dip | 2025 | 2503.07588 | 3 | supervised | vlm | no | tokens | VisionXLab/LRS-VQA | A distilled student of text-to-image attention picks tiles of an image pyramid, then tokens. |
| hiprune | 2025 | 2508.00553 | 1 | unsupervised | vlm | yes | tokens | Danielement321/HiPrune | Anchors of a middle encoder block, their neighbours, and registers of a deep block. |
| ecoflap | 2023 | 2310.02998 | 1 | self | vit llm clip vlm | yes | weights | ylsung/ECoFLaP | Forward-only loss sensitivity sets the ratio of each block, a local pruner does the rest. |
| fastervlm | 2024 | 2412.01818 | 1 | unsupervised | vlm | yes | tokens | Theia-4869/FasterVLM | Keeps the patches to which the encoder's [CLS] token attends most. |
| divprune | 2025 | 2503.02175 | 1 | unsupervised | vlm | yes | tokens | vbdi/divprune | Keeps the subset of visual tokens whose smallest pairwise distance is largest. |
| dependency-vit | 2023 | 2304.03282 | 4 | supervised | vit | yes | tokens | dingmyu/DependencyViT | Reversed attention forms a dependency tree whose silent leaves are pruned. |
| masksparsity | 2022 | 2201.06776 | 1 | supervised | cnn | yes | channels | CASIA-IVA-Lab/MaskSparsity | Sparsity regularisation of only the channels that are going to be removed. |
| disa | 2025 | 2505.19373 | 1 | supervised | clip | yes | patches | - | Prompt learning in which the prompted image encoder sees salient patches only. |
| survey-taxonomy | 2023 | 2308.06767 | 1 | - | - | - | - | hrcheng1066/awesome-pruning | The axes on which pruning methods are ordered, and advice on choosing. |
| tas | 2019 | 1905.09717 | 1 | supervised | cnn | no | macs | D-X-Y/AutoDL-Projects | Learns distributions over widths and depths, then trains the found network by distillation. |
| mmtok | 2025 | 2508.18264 | 1 | unsupervised | vlm | yes | tokens | Ironieser/MMTok | Greedy maximum coverage of text tokens and visual tokens by the kept ones. |
| lmd-vit | 2023 | 2306.14268 | 1 | supervised | vit | no | windows | LeiaLi/LMD-ViT | Windows that a predictor finds sharp skip attention and feed-forward. |
| lottery-ticket | 2018 | 1803.03635 | 1 | supervised | mlp cnn | yes | weights | google-research/lottery-ticket-hypothesis facebookresearch/open_lth | Train, remove the smallest weights, reset the survivors to their initial values, and repeat. |
| ecodiff | 2024 | 2412.02852 | 1 | self | diffusion | yes | units | YaNgZhAnG-V5/EcoDiff | Learns one mask over heads and neurons so that the final latent stays what it was. |
| pagcp | 2023 | 2303.11923 | 1 | supervised | cnn | no | macs | HankYe/PAGCP | Sequential channel pruning that keeps the loss of the worst-hit task within an allowance. |
| psod | 2024 | 2409.02368 | 1 | supervised | vit | - | - | - | Predicts several plausible salient masks for an image and how much people would prefer each. |
| iss-p | 2023 | 2303.09650 | 1 | supervised | vit cnn | yes | weights | Jiamian-Wang/Iterative-Soft-Shrinkage-SR | Shrinks the smallest weights a little in every iteration until the set of them has settled. |
| psa | 2025 | 2512.04025 | 1 | unsupervised | vlm diffusion | no | blocks | ziplab/Pyramid-Sparse-Attention | Sparse attention in which less important key blocks are read at a lower resolution. |
| adatoken-3d | 2025 | 2505.12782 | 1 | unsupervised | vlm | no | tokens | - | Gates out spatial tokens by attention flow, with a layer schedule from a profile of the model. |
| yopo | 2024 | 2410.06169 | 1 | supervised/unsupervised | vlm | yes | heads | ZhangAIPI/YOPO_MLLM_Pruning | Removes attention, heads, neurons and layers from the computation of visual tokens only. |
| salient-relevance | 2017 | 1712.08268 | 1 | unsupervised | cnn | - | - | Hey1Li/Salient-Relevance-Propagation | Runs context-aware saliency detection on the relevance map of a class. |
"""

BASELINES = r"""
| name | title (short) | spec | object | granularity | speed-up | when | how | order | data | start | recovery | task | decision | scope | fusion | stages | supervision | models | exact | unit | year | arXiv | code | description |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 2ssp | 2SSP | none | N L | struct | univ | PAT-PT | ACT+LOSS | iter | calib | pre | none | orig | stat | loc | - | 2 | unsupervised | llm | yes | params | 2025 | 2501.17771 | FabrizioSandri/2SSP | Neurons of small activations leave every MLP, then whole attentions whose loss costs least perplexity. |
| cdpruner | CDPruner | none | T | token | univ | RT | DIV+TXT | shot | input | pre | none | orig | dyn | loc | - | 1 | unsupervised | vlm | yes | tokens | 2025 | 2506.10967 | Theia-4869/CDPruner | Unlike tokens that have to do with the question, by a determinantal point process. |
| dart | DART | none | T | token | univ | RT | DIV | shot | input | pre | none | orig | dyn | loc | - | 1 | unsupervised | vlm | yes | tokens | 2025 | 2502.11494 | ZichenWen1/DART | Tokens least like a few pivots with large keys, after K layers. |
| dependency-tree | Dependency tree | dependency-vit | S | none | none | none | SAL | - | input | pre | none | - | - | - | - | 1 | unsupervised | vit | - | - | 2023 | 2304.03282 | dingmyu/DependencyViT | What hangs on each patch in the tree of reversed attention. |
| downsample | Downsample | none | T | token | univ | RT | UNI | shot | free | pre | none | orig | stat | loc | merge | 1 | unsupervised | vit vlm | no | tokens | - | - | - | Features averaged over the cells of a coarser grid. |
| fastv | FastV | fastv | T | token | univ | RT | ATT | shot | input | pre | none | orig | dyn | loc | - | 1 | unsupervised | vlm | yes | token | 2024 | 2403.06764 | pkunlp-icler/FastV | Image tokens the last prompt token attends to, after K layers. |
| flap | FLAP | weight-baselines | N H | struct | univ | PAT-PT | ACT | shot | calib | pre | none | orig | stat | glob | - | 1 | unsupervised | llm | yes | params | 2024 | 2312.11983 | CASIA-IVA-Lab/FLAP | Fluctuation of the inputs, ranked globally, with a bias for what left. |
| group-magnitude | Grouped magnitude | weight-baselines | N F C H | struct | univ | PAT+PAT-PT | NORM | either | free | pre | none | orig | stat | loc/glob | - | 1 | unsupervised | mlp cnn vit ssm bert llm | yes | units | 2023 | 2301.12900 | VainF/Torch-Pruning | L2 norm of the coupled slices that leave together. |
| isomorphic | Isomorphic Pruning | none | C F N H | struct | univ | PAT+PAT-PT | LOSS | shot | calib/free | pre | none/tune | orig | stat | glob | - | 1 | supervised/unsupervised | cnn vit | yes | units | 2024 | 2407.04616 | VainF/Isomorphic-Pruning | First-order importance of coupled units, ranked only among sub-structures of the same layers. |
| magnitude | Magnitude | weight-baselines | W | unstr/N:M | spec | any | MAG | shot | free | either | none | orig | stat | loc/glob | - | 1 | unsupervised | mlp cnn vit ssm bert llm | yes | weight | 2015 | 1506.02626 | - | Small absolute values leave first. No data. |
| minitron | Minitron | none | N H E L | struct | univ | PAT+PAT-PT | ACT | shot | calib | pre | train/none | orig | stat | loc | KD | 1 | unsupervised | llm | yes | params | 2024 | 2407.14679 | NVIDIA/Model-Optimizer | Quiet neurons, heads and channels leave, or blocks that change little; then the dense model is the teacher. |
| mone | MoNE | none | X | struct | univ | PAT-PT | ACT | shot | calib | pre | none | orig | stat | loc | - | 1 | unsupervised | llm | yes | units | 2025 | 2507.00390 | zxgx/mode-pd | Experts that are little used and vary little become constants, their mean output; the router stays. |
| obspa | OBSPA | spa | C | struct | univ | PAT-PT | LOSS | shot | free/calib | pre | none | orig | stat | glob | - | 1 | unsupervised | mlp cnn vit bert llm | yes | units | 2024 | 2403.18955 | - | Optimal Brain Surgeon over coupled channels, with the layers that read them solved for again. |
| owl | OWL | weight-baselines | W | unstr | spec | PAT-PT | MAG+ACT | shot | calib | pre | none | orig | stat | loc | - | 1 | unsupervised | vit ssm bert llm | yes | weight | 2023 | 2310.05175 | luuyin/OWL | Wanda's scores; blocks with more outliers keep more. |
| prumerge | PruMerge | none | T | token | univ | RT | ATT | shot | input | pre | none | orig | dyn | loc | merge | 1 | unsupervised | vlm | no | token | 2024 | 2403.15388 | 42Shawn/LLaVA-PruMerge | Patches whose attention from CLS is an outlier, with the patches like them merged into each. |
| pyramiddrop | PyramidDrop | none | T | token | univ | RT | ATT | iter | input | pre | none | orig | dyn | loc | - | 3 | unsupervised | vlm | yes | tokens | 2024 | 2410.17247 | Cooperx521/PyramidDrop | Image tokens the last prompt token attends to, ever fewer at three depths. |
| random | Random weights | weight-baselines | W | unstr/N:M | spec | any | none | shot | free | either | none | orig | stat | loc | - | 1 | unsupervised | mlp cnn vit ssm bert llm | yes | weight | - | - | - | Single weights in random order: the control. |
| random-structured | Random units | weight-baselines | N H | struct | univ | any | none | shot | free | either | none | orig | stat | loc | - | 1 | unsupervised | vit bert llm | yes | params | - | - | - | Heads and neurons in random order: the control. |
| random-tokens | Random tokens | none | T | token | univ | RT | none | shot | free | pre | none | orig | dyn | loc | - | 1 | unsupervised | vit vlm | yes | tokens | - | - | - | A random choice of tokens: the control. |
| reap | REAP | none | X | struct | univ | PAT-PT | ACT | shot | calib | pre | none | orig | stat | loc | - | 1 | unsupervised | llm | yes | units | 2025 | 2510.13999 | CerebrasResearch/reap | Experts leave by router weight times output norm, over the tokens that reach them. |
| ream | REAM | none | X | struct | univ | PAT-PT | ACT | iter | calib | pre | none | orig | stat | loc | merge | 1 | unsupervised | llm | yes | units | 2026 | 2604.04356 | SamsungSAILMontreal/ream | Experts that would leave by REAP are averaged into those most like them, neurons matched, layer by layer. |
| ria | RIA | weight-baselines | W | unstr/N:M | spec | PAT-PT | MAG+ACT | shot | calib | pre | none | orig | stat | loc | - | 1 | unsupervised | cnn vit ssm bert llm | yes | weight | 2024 | - | biomedical-cybernetics/Relative-importance-and-activation-pruning | Relative weight in its row and column, times input norm to the power a. |
| shortgpt | ShortGPT | weight-baselines | L | struct | univ | PAT-PT | ACT | shot | calib | pre | none | orig | stat | glob | - | 1 | unsupervised | llm | yes | layers | 2024 | 2403.03853 | sramshetty/ShortGPT | Blocks whose output points the way of their input leave whole. |
| slicegpt | SliceGPT | none | E | struct | univ | PAT-PT | ACT | shot | calib | pre | none/LoRA | orig | stat | glob | - | 1 | unsupervised | llm | yes | params | 2024 | 2401.15024 | microsoft/TransformerCompression | The residual stream is turned into its principal components, and the last of them leave. |
| sparsegpt | SparseGPT | weight-baselines | W | unstr/N:M | spec | PAT-PT | LOSS | shot | calib | pre | none | orig | stat | loc | - | 1 | unsupervised | cnn vit ssm bert llm | yes | weight | 2023 | 2301.00774 | IST-DASLab/sparsegpt | Second-order scores, and an update of the weights that stay. |
| sparsevlm | SparseVLM | none | T | token | univ | RT | ATT+TXT | iter | input | pre | none | orig | dyn | loc | merge | 3 | unsupervised | vlm | yes | tokens | 2024 | 2410.04417 | Gumpest/SparseVLMs | Words that match the picture rate its tokens at three depths; what is dropped is merged in part. |
| taylor | LLM-Pruner | weight-baselines | N H | struct | univ | PAT-PT | LOSS | shot | calib | pre | none/LoRA | orig | stat | loc | - | 1 | unsupervised | llm | yes | params | 2023 | 2305.11627 | horseee/LLM-Pruner | Taylor importance of coupled heads and neurons, ranked within each layer. |
| tome | ToMe | none | T | token | univ | RT | DIV | iter | input | pre | none | orig | dyn | loc | merge | 1 | unsupervised | vit vlm | yes | token | 2023 | 2210.09461 | facebookresearch/ToMe | Merges the most alike tokens in every block of the vision tower. |
| uniform-grid | Uniform grid | none | T | token | univ | RT | UNI | shot | free | pre | none | orig | stat | loc | - | 1 | unsupervised | vit vlm | yes | tokens | - | - | - | Tokens at even distances: the control that looks at nothing. |
| vidcom2 | VidCom2 | none | T | token | univ | RT | DIV | shot | input | pre | none | orig | dyn | loc | - | 1 | unsupervised | vlm | yes | token | 2025 | 2505.14454 | xuyang-liu16/VidCom2 | Frames unlike the video keep more of the tokens that are unlike frame and video. |
| visionzip | VisionZip | none | T | token | univ | RT | ATT | shot | input | pre | none | orig | dyn | loc | merge | 1 | unsupervised | vlm | yes | token | 2024 | 2412.04467 | dvlab-research/VisionZip | CLS and the patches it attends to, and a few tokens that all others merge into. |
| vispruner | VisPruner | none | T | token | univ | RT | ATT+DIV | shot | input | pre | none | orig | dyn | loc | - | 1 | unsupervised | vlm | yes | token | 2025 | 2412.01818 | Theia-4869/VisPruner | Patches CLS attends to, and others that have no double. |
| wanda | Wanda | weight-baselines | W | unstr/N:M | spec | PAT-PT | MAG+ACT | shot | calib | pre | none | orig | stat | loc | - | 1 | unsupervised | cnn vit ssm bert llm | yes | weight | 2023 | 2306.11695 | locuslab/wanda | Weight magnitude times input norm, per output row. |
| salient-tokens | Salient tokens | none | T | token | univ | RT | SAL | shot | input | pre | none | orig | dyn | loc | - | 1 | unsupervised | vlm | yes | tokens | - | - | - | Tokens on what a map of the picture marks; what is left of the budget is spread evenly. |
| selective-normgrad | Selective NormGrad | normgrad | S | none | none | none | SAL | - | input | pre | none | - | - | - | - | 1 | unsupervised | cnn vit | - | - | 2020 | 2004.02866 | - | NormGrad that counts only what speaks for the class. |
| linear-approximation | Linear approximation | normgrad | S | none | none | none | SAL | - | input | pre | none | - | - | - | - | 1 | unsupervised | cnn vit | - | - | 2020 | 2004.02866 | - | Activation times gradient, summed over channels. |
| grad-cam | Grad-CAM | none | S | none | none | none | SAL | - | input | pre | none | - | - | - | - | 1 | unsupervised | cnn vit | - | - | 2017 | 1610.02391 | - | Channels weighted by their mean gradient, where the sum is positive. |
| gradient | Gradient | none | S | none | none | none | SAL | - | input | pre | none | - | - | - | - | 1 | unsupervised | cnn vit llm | - | - | 2013 | 1312.6034 | - | The largest absolute gradient over the colours of a pixel. |
| guided-backprop | Guided backpropagation | none | S | none | none | none | SAL | - | input | pre | none | - | - | - | - | 1 | unsupervised | cnn vit | - | - | 2015 | 1412.6806 | - | The gradient that passes activation functions only where it is positive. |
| guided-grad-cam | Guided Grad-CAM | none | S | none | none | none | SAL | - | input | pre | none | - | - | - | - | 1 | unsupervised | cnn vit | - | - | 2017 | 1610.02391 | - | Guided backpropagation times Grad-CAM. |
| integrated-gradients | Integrated gradients | none | S | none | none | none | SAL | - | input | pre | none | - | - | - | - | 1 | unsupervised | cnn vit llm | - | - | 2017 | 1703.01365 | - | The gradient on the way from a baseline to the picture, times that way: parts of the logit. |
| occlusion | Occlusion | none | S | none | none | none | SAL | - | input | pre | none | - | - | - | - | 1 | unsupervised | cnn vit llm | - | - | 2013 | 1311.2901 | - | What the logit loses while a square of the picture is covered. |
| smoothgrad | SmoothGrad | none | S | none | none | none | SAL | - | input | pre | none | - | - | - | - | 1 | unsupervised | cnn vit llm | - | - | 2017 | 1706.03825 | - | The mean gradient over noisy copies of the picture. |
| lrp | Layer-wise relevance propagation | lrp-pruning | S | none | none | none | SAL | - | input | pre | none | - | - | - | - | 1 | unsupervised | cnn vit llm | - | - | 2015 | - | - | What each pixel has in the class's logit, by rules that hand all of it on. |
"""
